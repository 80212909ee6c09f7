"""The maps of stores, as the JSON that clients get."""

from __future__ import annotations

import asyncio
import threading

from gemify.retrieval.document_store import Store
from gemify.retrieval.index import GemIndex
from gemify.retrieval.store_map import draw_map
from gemify.serving.protocol.responses import StoreMapResponse

_DECIMALS = 4


class MapCache:
    """The last map of each store. It is drawn anew, one store at a time, when the store has changed."""

    def __init__(self) -> None:
        self._drawn: dict[str, tuple[tuple[int | str, ...], bytes]] = {}
        self._one_at_a_time = threading.Lock()  # held by the thread that draws, whether its client waits or not

    async def render(self, index: GemIndex) -> bytes:
        """Return the JSON of a store's map. Raises ValueError if the store is damaged."""
        return await asyncio.to_thread(self._render, index)

    def _render(self, index: GemIndex) -> bytes:
        with self._one_at_a_time:
            return self._draw_changed(index)

    def _draw_changed(self, index: GemIndex) -> bytes:
        store = index.store
        # A store that was made again counts its versions from the beginning: its files are part of the key.
        files = sorted(f.version for f in store.files().values()) if isinstance(store, Store) else []
        version: tuple[int | str, ...] = (*store.version, *files)
        known = self._drawn.get(store.uri)
        if known is None or known[0] != version:
            drawn = draw_map(store)
            response = StoreMapResponse(
                object="store.map",
                ids=list(drawn.ids),
                points=[[round(value, _DECIMALS) for value in point] for point in drawn.points_N2.tolist()],
                files=list(drawn.files),
                file_indices=drawn.file_of_N.tolist(),
                num_passages=drawn.num_passages,
                explained_variance=round(drawn.explained_variance, _DECIMALS),
            )
            known = self._drawn[store.uri] = (version, response.to_json())
        return known[1]
