"""A scikit-learn transformer whose features are cached rows: fits and searches encode each distinct item once."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from os import PathLike
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from typing_extensions import Self

from quatcache.embedding_cache import EmbeddingCache
from quatcache.encoders.identity import JSON
from quatcache.errors import ConfigError, MissingDependencyError

try:
    from sklearn.base import BaseEstimator, TransformerMixin
    from sklearn.exceptions import NotFittedError
except ImportError as error:
    raise MissingDependencyError("scikit-learn is not installed: pip install 'quatcache[sklearn]'") from error

__all__ = ["EmbeddingTransformer"]


class EmbeddingTransformer(TransformerMixin, BaseEstimator):  # type: ignore[misc]
    """Turns items into their rows, for pipelines.

    There is nothing to fit. Clones share the encoder, which is frozen, and the rows that were found so far; processes
    (``n_jobs``) share them through ``save_dir``.

    Args:
        encoder: As for :class:`~quatcache.embedding_cache.EmbeddingCache`.
        save_dir: Directory in which rows persist; None: in memory, where each process encodes for itself.
        batch_size: Items per encoder call, at most.
        identity: Of a function, what decides its rows.
        dtype: Storage dtype of floating rows.
        max_size: Budget in bytes for rows.
        verify: Stored rows that are compared with what the encoder gives now.
        device: Where the encoder computes.

    Example:
        >>> from sklearn.linear_model import LogisticRegression
        >>> from sklearn.pipeline import make_pipeline
        >>> def letters(texts):
        ...     return [[text.count("a"), text.count("o")] for text in texts]
        >>> model = make_pipeline(EmbeddingTransformer(letters), LogisticRegression())
        >>> model.fit(["banana", "papaya", "onion", "coconut"], [0, 0, 1, 1]).predict(["avocado", "tomato oo"]).tolist()
        [1, 1]
    """

    def __init__(
        self,
        encoder: Any,
        save_dir: str | PathLike[str] | None = None,
        *,
        batch_size: int = 32,
        identity: str | Mapping[str, JSON] | None = None,
        dtype: torch.dtype | str | None = None,
        max_size: int | str | None = None,
        verify: Any = "auto",
        device: torch.device | str | None = None,
    ) -> None:
        self.encoder = encoder
        self.save_dir = save_dir
        self.batch_size = batch_size
        self.identity = identity
        self.dtype = dtype
        self.max_size = max_size
        self.verify = verify
        self.device = device

    @property
    def cache(self) -> EmbeddingCache:
        """The cache that rows come from; another one after a parameter was set."""
        given = self.get_params(deep=False)
        given.pop("batch_size")
        made: tuple[dict[str, Any], EmbeddingCache] | None = self.__dict__.get("_made")
        if made is None or made[0] != given:
            made = self._made = (given, EmbeddingCache(**given))
        return made[1]

    def fit(self, X: Any, y: Any = None) -> Self:
        """Check the parameters; there is nothing to learn.

        Args:
            X: N items.
            y: Ignored.
        """
        _column(X)
        self.cache  # noqa: B018
        return self

    def transform(self, X: Any) -> npt.NDArray[Any]:
        """Give the rows of items.

        Args:
            X: N items: a list, an array or a Series; or a table of one column.

        Returns:
            ``(N, D)``.
        """
        rows: Any = self.cache.encode(_column(X), self.batch_size, convert_to_numpy=True)
        return rows.reshape(len(rows), math.prod(rows.shape[1:]))  # type: ignore[no-any-return]

    def get_feature_names_out(self, input_features: Any = None) -> npt.NDArray[np.object_]:
        """Name the features.

        Args:
            input_features: Ignored.

        Raises:
            NotFittedError: How many there are is not known: nothing was transformed with a function yet.
        """
        size = math.prod(self.cache.encode([], convert_to_numpy=True).shape[1:])
        if not size:
            raise NotFittedError(
                "the function that encodes was not called yet, so how many features it gives is not known; call "
                "transform first."
            )
        return np.array([f"embedding{place}" for place in range(size)], dtype=object)

    def __sklearn_is_fitted__(self) -> bool:
        """Say that nothing has to be fitted."""
        return True

    def __sklearn_clone__(self) -> Self:
        """Share the encoder and the rows: they are the same for every clone."""
        twin = type(self)(**self.get_params(deep=False))
        if "_made" in self.__dict__:
            twin._made = self._made
        return twin


def _column(X: Any) -> Sequence[Any]:
    """Give the items of a table of one column; what is no table is the items."""
    if getattr(X, "ndim", 1) != 2 or not (hasattr(X, "iloc") or getattr(getattr(X, "dtype", None), "kind", "") == "O"):
        return X  # type: ignore[no-any-return]
    if X.shape[1] != 1:
        raise ConfigError(
            f"X is a table of {X.shape[1]} columns; choose one: ColumnTransformer([('texts', transformer, 'column')])."
        )
    return X.iloc[:, 0] if hasattr(X, "iloc") else X[:, 0]  # type: ignore[no-any-return]
