"""The page on several processes and machines shows what can be run, and names what exists."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest
from pytorch_lightning.plugins import environments

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "distributed.md").read_text(encoding="utf-8")


def blocks(language):
    return re.findall(rf"^```{language}\n(.*?)^```$", PAGE, flags=re.MULTILINE | re.DOTALL)


def test_links_lead_to_files():
    links = re.findall(r"\]\((?!https?:)([^)#]+)", PAGE)
    assert links
    assert not [link for link in links if not (ROOT / "docs" / link).exists()]


def test_commands_and_programs_can_be_read():
    assert len(blocks("bash")) == 3
    shell = shutil.which("bash")
    for block in blocks("bash") if shell else ():
        assert subprocess.run([shell, "-n"], input=block, text=True, check=False).returncode == 0
    for block in blocks("python"):
        compile(block, "distributed.md", "exec")


def test_the_pods_of_the_job_share_one_volume():
    yaml = pytest.importorskip("yaml")
    (block,) = blocks("yaml")
    replicas = yaml.safe_load(block)["spec"]["pytorchReplicaSpecs"]
    assert replicas["Master"] == replicas["Worker"]
    pod = replicas["Worker"]["template"]["spec"]
    assert pod["containers"][0]["volumeMounts"][0]["name"] == pod["volumes"][0]["name"]


def test_environments_that_are_named_exist():
    named = set(re.findall(r"\b(\w+Environment)\(", PAGE))
    assert named == {"SLURMEnvironment", "KubeflowEnvironment"}
    for name in named:
        assert hasattr(environments, name)
