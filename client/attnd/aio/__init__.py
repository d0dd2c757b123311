"""The asyncio client: what `attnd` has, awaited.

```
async with await attnd.aio.connect("localhost:7411") as client:
    async with await client.create_cache(...) as cache, cache.session() as session:
        step = await session.step(metadata)
        output = await step.attend(layer, q, k, v)
```
"""

from attnd.aio.cache import AsyncCache
from attnd.aio.client import AsyncClient, connect
from attnd.aio.session import AsyncSession, AsyncStep

__all__ = ["AsyncCache", "AsyncClient", "AsyncSession", "AsyncStep", "connect"]
