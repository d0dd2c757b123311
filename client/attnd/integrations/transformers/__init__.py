"""transformers' models with attention and KV on a server.

```
from attnd.integrations.transformers import attach

attach(model, client, max_tokens=4096)
model.generate(**inputs)
```

Or with a cache by hand, which several calls may use:

```
from attnd.integrations.transformers import RemoteCache

model.set_attn_implementation("attnd")
with RemoteCache(client, model.config, max_tokens=4096, dtype=model.dtype) as cache:
    model.generate(**inputs, past_key_values=cache)
```

transformers asks a cache for keys and values and hands them to an attention function with a mask. Here the cache gives
the new keys and values back with a mark on them. The attention function, registered as "attnd" when this module is
imported, finds the cache by the mark and sends them. The mask that it gets is the padding of the batch, nothing more.
"""

from attnd.extras import as_missing

try:
    from attnd.integrations.transformers.attach import Attachment, attach, detach
    from attnd.integrations.transformers.attention import register
    from attnd.integrations.transformers.encoders.pairs import RemotePair
    from attnd.integrations.transformers.remote_cache import RemoteCache
except ModuleNotFoundError as error:
    raise as_missing(error, "attnd.integrations.transformers", "transformers") from None

__all__ = ["Attachment", "RemoteCache", "RemotePair", "attach", "detach", "register"]
