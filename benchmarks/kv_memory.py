"""KV memory of one long request in models whose layers have windows: all pages kept, and those given back.

Prints the table of docs/memory.md. It needs no GPU and starts nothing.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import chain, islice, repeat

from attnd_server.attention.geometry import Geometry
from attnd_server.kv.cache_shape import CacheShape

TOKENS, PAGE_SIZE = 131_072, 16


@dataclass(frozen=True)
class Layers:
    """Layers of one kind.

    Attributes:
        num_kv_heads: of each.
        head_dim: of K and V.
        window: in tokens; 0: none.
    """

    num_kv_heads: int
    head_dim: int
    window: int = 0

    def most_pages(self, num_tokens: int, *, gives_back: bool) -> int:
        """Pages that each layer of a request of so many tokens holds at most.

        Of a window that gives pages back these are its own, one more because it may begin within a page, and the page
        into which the step stores.
        """
        all_pages = -(-num_tokens // PAGE_SIZE)
        return min(all_pages, -(-self.window // PAGE_SIZE) + 2) if gives_back and self.window else all_pages


@dataclass(frozen=True)
class Model:
    """A model whose layers alternate.

    Attributes:
        name: as its makers call it.
        windowed: the layers with a window.
        full: the others.
        run: windowed layers before each full one.
        num_layers: that have K and V of their own: others read the K and V of one of these.
    """

    name: str
    windowed: Layers
    full: Layers
    run: int
    num_layers: int

    @property
    def kinds(self) -> list[Layers]:
        """Of each layer."""
        pattern = chain.from_iterable(repeat([*repeat(self.windowed, self.run), self.full]))
        return list(islice(pattern, self.num_layers))

    def shape(self, num_tokens: int, *, gives_back: bool) -> CacheShape[Geometry]:
        """A cache with the pages of one request, with a group for each kind of layer."""
        numbers = {
            kind: [i for i, each in enumerate(self.kinds) if each == kind] for kind in (self.windowed, self.full)
        }
        groups = tuple(
            Geometry(
                num_layers=len(layers),
                num_kv_heads=kind.num_kv_heads,
                head_dim=kind.head_dim,
                num_pages=kind.most_pages(num_tokens, gives_back=gives_back),
                page_size=PAGE_SIZE,
                window=kind.window,
            )
            for kind, layers in numbers.items()
        )
        return CacheShape(groups, tuple(map(tuple, numbers.values())))


# Layers, KV heads, head dims and windows are those of the files that docs/memory.md names.
MODELS = [
    Model("gpt-oss-20b", Layers(8, 64, 128), Layers(8, 64), run=1, num_layers=24),
    Model("gpt-oss-120b", Layers(8, 64, 128), Layers(8, 64), run=1, num_layers=36),
    Model("Gemma 3 4B", Layers(4, 256, 1024), Layers(4, 256), run=5, num_layers=34),
    Model("Gemma 3 12B", Layers(8, 256, 1024), Layers(8, 256), run=5, num_layers=48),
    Model("Gemma 3 27B", Layers(16, 128, 1024), Layers(16, 128), run=5, num_layers=62),
    Model("Gemma 4 E2B", Layers(1, 256, 512), Layers(1, 512), run=4, num_layers=35 - 20),
    Model("Gemma 4 E4B", Layers(2, 256, 512), Layers(2, 512), run=5, num_layers=42 - 18),
    Model("Gemma 4 26B-A4B", Layers(8, 256, 1024), Layers(2, 512), run=5, num_layers=30),
    Model("Gemma 4 31B", Layers(16, 256, 1024), Layers(4, 512), run=5, num_layers=60),
]


def table(models: list[Model] = MODELS, num_tokens: int = TOKENS) -> str:
    """The table in Markdown."""
    lines = [
        "| model | windowed layers | full layers | all pages kept | windowed pages given back | share |",
        "|---|---|---|---:|---:|---:|",
    ]
    for model in models:
        kept, given_back = (model.shape(num_tokens, gives_back=each) for each in (False, True))
        kinds = [
            f"{len(layers)} x {group.num_kv_heads} x {group.head_dim}"
            for group, layers in zip(kept.groups, kept.layers, strict=True)
        ]
        kinds[0] += f", window {model.windowed.window}"
        sizes = [f"{each.num_bytes / (1 << 30):.2f} GiB" for each in (kept, given_back)]
        share = f"{given_back.num_bytes / kept.num_bytes:.0%}"
        lines.append(f"| {' | '.join([model.name, *kinds, *sizes, share])} |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(table())
