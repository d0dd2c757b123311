"""`install()`, in a stand-in of Diffulex's modules: its runner runs as it is, and its state is everybody's."""

from __future__ import annotations

import importlib
import subprocess
import sys
from collections.abc import Iterator
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

import attnd
import attnd_server
from attnd.errors import InvalidRequest, Unsupported
from attnd.integrations.diffulex import attention, install, installation
from attnd.integrations.diffulex import metadata as ours
from tests.attention import dense_attention
from tests.servers import ROOT

ATTENTION, METADATA, RUNNER = (
    "diffulex.attention.attn_impl",
    "diffulex.attention.metadata",
    "diffulex.strategy.one_request",
)


def load(name: str) -> Any:
    return importlib.import_module(name)


def forget() -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] == "diffulex"]:
        del sys.modules[name]


@pytest.fixture(autouse=True)
def _stand_in(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.syspath_prepend(str(ROOT / "tests" / "stand_ins"))
    monkeypatch.setattr(ours, "_fetch", None)
    forget()
    yield
    if installation._installed is not None:
        installation._installed.uninstall()
    forget()


@pytest.fixture(params=["before", "after"])
def when(request: pytest.FixtureRequest) -> str:
    """Whether the runner's modules are imported before it is installed, or after."""
    if request.param == "before":
        load(RUNNER)
    return str(request.param)


@pytest.fixture(scope="module")
def client() -> Iterator[attnd.Client]:
    with attnd.connect("inproc://") as connected:
        yield connected


def config(**changes: object) -> SimpleNamespace:
    fields = {"page_size": 4, "attn_impl": "triton", "num_pages": -1, "max_num_reqs": 3, "max_model_len": 15}
    return SimpleNamespace(**{**fields, **changes})


def expected(model: torch.nn.Module, hidden: torch.Tensor) -> torch.Tensor:
    """What the model gives if its attention is computed here, in float64."""
    hidden = hidden.double()
    for block in model.blocks:
        weights = [(layer.weight.double(), layer.bias.double()) for layer in (block.q, block.k, block.v)]
        q, k, v = (torch.nn.functional.linear(hidden, *each).view(len(hidden), -1, 8) for each in weights)
        hidden = hidden + dense_attention(q, k, v).reshape(len(hidden), -1)
    return hidden


class TestClass:
    def test_it_is_everywhere(self, when: str) -> None:
        install()
        assert load(ATTENTION).Attention is attnd.Attention
        assert load("diffulex.attention").Attention is attnd.Attention
        assert load("diffulex.model.plain").Attention is attnd.Attention

    def test_under_another_name_too(self) -> None:
        module = ModuleType("diffulex.renamed")
        module.Local = load(ATTENTION).Attention
        sys.modules["diffulex.renamed"] = module
        stranger = ModuleType("diffulexible")
        stranger.Local = module.Local
        sys.modules["diffulexible"] = stranger
        try:
            install()
        finally:
            del sys.modules["diffulexible"]
        assert module.Local is attnd.Attention
        assert stranger.Local is not attnd.Attention

    def test_uninstall_gives_back_what_was_there(self, when: str) -> None:
        implementation = load(ATTENTION)
        theirs = implementation.Attention
        with install():
            assert load("diffulex.model.plain").Attention is attnd.Attention
        assert implementation.Attention is load("diffulex.model.plain").Attention is theirs
        assert attention.unchosen == {"auto"}

    def test_twice_is_once(self) -> None:
        theirs = load(ATTENTION).Attention
        first = install()
        assert install() is first
        first.uninstall()
        first.uninstall()
        assert load(ATTENTION).Attention is theirs

    def test_modules_that_were_imported_anew_are_others(self) -> None:
        first = install()
        forget()
        second = install()
        assert second is not first
        assert load(ATTENTION).Attention is attnd.Attention
        load(METADATA).set_warming_up(True)
        assert attnd.is_warming_up()

    def test_triton_is_the_caches_choice_there(self) -> None:
        layers = {"num_heads": 4, "head_dim": 8, "scale": 1.0, "num_kv_heads": 2}
        named = {name: attnd.Attention(**layers, attn_impl=name)._options.backend for name in ("triton", "naive")}
        assert named == {"triton": "triton", "naive": "naive"}
        with install():
            backends = [attnd.Attention(**layers, attn_impl=name) for name in ("triton", "triton_grouped", "naive")]
        assert [layer._options.backend for layer in backends] == ["", "triton_grouped", "naive"]
        assert [layer.attn_impl for layer in backends] == ["triton", "triton_grouped", "naive"]


class TestState:
    def test_warming_up_is_one(self, when: str) -> None:
        install()
        theirs = load(METADATA)
        for say in (theirs.set_warming_up, attnd.set_warming_up, attnd_server.set_warming_up):
            say(True)
            assert theirs.WARMING_UP is theirs.is_warming_up() is ours.WARMING_UP is True
            assert attnd.is_warming_up() is attnd_server.is_warming_up() is True
            attnd.reset_warming_up()
            assert [theirs.WARMING_UP, attnd.is_warming_up(), ours.WARMING_UP] == [False] * 3
        theirs.WARMING_UP = True
        assert attnd.is_warming_up()

    def test_a_warm_up_that_runs_goes_on(self) -> None:
        attnd.set_warming_up(True)
        with install():
            assert load(METADATA).is_warming_up()
            load(METADATA).reset_warming_up()
        assert not attnd.is_warming_up()

    def test_the_fetch_function_is_one(self, when: str) -> None:
        install()
        theirs = load(METADATA)
        with pytest.raises(InvalidRequest, match="set_fetch_fn_for_attn_metadata"):
            attnd.fetch_attn_metadata()
        for install_one in (theirs.set_fetch_fn_for_attn_metadata, attnd.set_fetch_fn_for_attn_metadata):
            marker = object()
            install_one(lambda marker=marker: marker)
            assert attnd.fetch_attn_metadata() is theirs.fetch_attn_metadata() is marker

    def test_a_function_that_was_installed_here_goes_along(self) -> None:
        marker = object()
        attnd.set_fetch_fn_for_attn_metadata(lambda: marker)
        install()
        assert load(METADATA).fetch_attn_metadata() is marker

    def test_names_may_be_missing(self) -> None:
        theirs = load(METADATA)
        for name in ("set_warming_up", "is_warming_up", "reset_warming_up", "set_fetch_fn_for_attn_metadata"):
            delattr(theirs, name)
        install()
        attnd.set_warming_up(True)
        assert theirs.WARMING_UP is True
        theirs.WARMING_UP = False
        assert not attnd.is_warming_up()
        attnd.set_fetch_fn_for_attn_metadata(lambda: 5)
        assert theirs.fetch_attn_metadata() == attnd.fetch_attn_metadata() == 5


class TestRunner:
    def test_it_runs_as_it_is(self, client: attnd.Client, when: str) -> None:
        with install(client):
            runner = load(RUNNER).OneRequestRunner(config())
            hidden = torch.randn(9, 32)
            first, second = runner.run(hidden[:6], 0), runner.run(hidden[6:7], 6)
            third = runner.run(hidden[7:], 7)
            runner.exit()
        with torch.no_grad():
            wanted, warm = expected(runner.model, hidden), expected(runner.model, torch.ones(3, 32))
        torch.testing.assert_close(torch.cat([first, second, third]).double(), wanted, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(runner.warm.double(), warm, atol=1e-5, rtol=1e-5)

    def test_the_cache_is_the_servers(self, client: attnd.Client) -> None:
        before = len(client.list_caches())
        with install(client):
            runner = load(RUNNER).OneRequestRunner(config())
        geometry = runner.attnd_session.cache.config
        assert (geometry.num_layers, geometry.num_kv_heads, geometry.head_dim, geometry.page_size) == (2, 2, 8, 4)
        assert runner.config.num_pages == geometry.num_pages == 3 * 4
        assert not hasattr(runner, "kv_cache")
        assert len(client.list_caches()) == before + 1
        runner.exit()
        assert runner.has_left
        assert len(client.list_caches()) == before

    @pytest.mark.parametrize(
        ("arguments", "changes", "num_pages"),
        [({"num_pages": 5}, {"num_pages": 7}, 5), ({}, {"num_pages": 7}, 7), ({}, {"max_num_reqs": 1}, 4)],
        ids=["argument", "config", "requests"],
    )
    def test_pages(self, client: attnd.Client, arguments: dict, changes: dict, num_pages: int) -> None:
        with install(client, **arguments):
            runner = load(RUNNER).OneRequestRunner(config(num_kvcache_blocks=-1, **changes))
        assert runner.config.num_pages == runner.config.num_kvcache_blocks == num_pages
        runner.exit()

    def test_pages_are_at_most_what_the_server_has(self, client: attnd.Client) -> None:
        device = client.capabilities().devices[0]
        with install(client):
            runner = load(RUNNER).OneRequestRunner(config(max_num_reqs=1 << 40))
        page_bytes = 2 * 2 * 2 * 8 * 4 * 4
        assert runner.config.num_pages == (device.num_bytes_limit - device.num_bytes_used) // page_bytes
        runner.exit()

    def test_an_address_is_enough(self, client: attnd.Client) -> None:
        with install("inproc://", num_pages=4, dtype=torch.float32):
            runner = load(RUNNER).OneRequestRunner(config())
            runner.run(torch.randn(2, 32), 0)
        runner.exit()

    def test_a_cache_of_ones_own(self, client: attnd.Client) -> None:
        geometry = {"num_layers": 2, "num_kv_heads": 2, "head_dim": 8, "page_size": 4, "dtype": "float32"}
        with client.create_cache(num_pages=6, **geometry) as cache, install(cache):
            runner = load(RUNNER).OneRequestRunner(config())
            assert runner.config.num_pages == 6
            runner.exit()
            assert cache.info().num_pages_written == 0  # it is still there

    def test_without_a_server_it_allocates_as_ever(self, client: attnd.Client) -> None:
        with install() as installed:
            runner = load(RUNNER).OneRequestRunner(config())
            assert torch.equal(runner.warm, torch.ones(3, 32))  # nothing was added to it while warming up
            assert runner.kv_cache.shape == (2,)
            with pytest.raises(InvalidRequest, match="server is None, but must be given to install"):
                installed.attach(runner)
            with pytest.raises(InvalidRequest, match="not attached to a server"):
                runner.run(torch.ones(1, 32), 0)

    def test_arguments_of_the_last_call_count(self, client: attnd.Client) -> None:
        runners = load(RUNNER)
        first = install(client, num_pages=5)
        assert install(client, num_pages=6) is first
        runner = runners.OneRequestRunner(config())
        assert runner.config.num_pages == 6
        runner.exit()
        install()
        assert runners.OneRequestRunner(config()).kv_cache.shape == (2,)

    def test_uninstall_leaves_no_hook(self, client: attnd.Client) -> None:
        base, runners = load("diffulex.engine.model_runner").ModelRunnerBase, load(RUNNER)
        initialisers = base.__init__, runners.OneRequestRunner.__init__
        with install(client):
            assert base.__init__ is not initialisers[0]
        assert (base.__init__, runners.OneRequestRunner.__init__) == initialisers

    def test_a_runner_of_ones_own_is_attached_by_hand(self, client: attnd.Client) -> None:
        with install(client) as installed:
            runner = SimpleNamespace(model=load("diffulex.model.plain").Plain("auto"), config=config())
            assert installed.attach(runner) == installed.attach(runner) == runner.config.num_pages == 12
            runner.attnd_session.cache.delete()

    @pytest.mark.parametrize(
        ("runner", "message"),
        [
            (SimpleNamespace(config=None), "model of the runner is None, but must be a torch module"),
            (SimpleNamespace(model=torch.nn.Linear(2, 2)), r"model has 0 attnd\.Attention layers"),
        ],
    )
    def test_what_is_no_runner_is_refused(self, client: attnd.Client, runner: object, message: str) -> None:
        with install(client) as installed, pytest.raises(InvalidRequest, match=message):
            installed.attach(runner)

    def test_a_layer_that_was_made_before_is_refused(self, client: attnd.Client) -> None:
        model = load("diffulex.model.plain").Plain("triton")
        with install(client) as installed:
            runner = SimpleNamespace(model=model, config=config())
            with pytest.raises(InvalidRequest, match=r"blocks\.0\.attn of the model attends in this process") as caught:
                installed.attach(runner)
        assert caught.value.field == "model"

    def test_a_model_that_does_not_fit_leaves_no_cache(self, client: attnd.Client) -> None:
        before = len(client.list_caches())
        with install(client) as installed:
            model = load("diffulex.model.plain").Plain("triton")
            model.blocks[1].attn = attnd.Attention(4, 16, 1.0, 2)
            with pytest.raises(InvalidRequest, match="head_dim of layer 1 is 16"):
                installed.attach(SimpleNamespace(model=model, config=config()))
        assert len(client.list_caches()) == before

    def test_pages_must_be_known(self, client: attnd.Client) -> None:
        with install(client) as installed:
            runner = SimpleNamespace(model=load("diffulex.model.plain").Plain("triton"), config=None)
            with pytest.raises(InvalidRequest, match="num_pages is None, but must be given to install") as caught:
                installed.attach(runner)
        assert caught.value.field == "num_pages"


def test_a_server_of_another_kind_is_refused() -> None:
    with pytest.raises(InvalidRequest, match="server is a int, but must be an address, a Client, a Cache or None"):
        install(7411)
    assert load(ATTENTION).Attention is not attnd.Attention


def test_a_runner_in_another_place_is_found(client: attnd.Client) -> None:
    module = ModuleType("diffulex.elsewhere")
    sys.modules["diffulex.elsewhere"] = module

    class Runner:
        def __init__(self) -> None:
            self.config = config()
            self.allocate_kv_cache()  # there is no model yet
            self.model = None

        def allocate_kv_cache(self) -> None:
            raise AssertionError

    module.Runner = Runner
    with install(client), pytest.raises(InvalidRequest, match="model of the runner is None"):
        Runner()


@pytest.mark.parametrize("broken", ["diffulex", "diffulex.attention.attn_impl"])
def test_without_diffulex_it_says_so(monkeypatch: pytest.MonkeyPatch, broken: str) -> None:
    monkeypatch.setitem(sys.modules, broken, None)
    with pytest.raises(Unsupported, match=r"diffulex.* is not installed, but install\(\) needs Diffulex") as caught:
        install()
    assert isinstance(caught.value, ModuleNotFoundError)


def test_another_diffulex_is_refused() -> None:
    del load(ATTENTION).Attention
    with pytest.raises(Unsupported, match=r"has no Attention"):
        install()


def test_it_is_imported_without_torch_and_diffulex() -> None:
    program = (
        "import sys; from attnd.integrations.diffulex import install;"
        "assert not {'torch', 'numpy', 'diffulex'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", program], check=True, timeout=60)
