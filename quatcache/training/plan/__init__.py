"""What caching would cost and save, found out before anything is filled."""

from quatcache.training.plan.forecast import CachePlan, DatasetPlan, EncoderPlan
from quatcache.training.plan.planner import plan, plan_from_config

__all__ = ["CachePlan", "DatasetPlan", "EncoderPlan", "plan", "plan_from_config"]
