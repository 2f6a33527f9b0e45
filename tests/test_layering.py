"""Who may import whom: `protocol` knows nobody, `client` knows `protocol`, the worker knows neither."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
OURS = ("protocol", "client", "bridge")


def name_of(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


MODULES = {name_of(path): path for package in OURS for path in sorted((ROOT / package).rglob("*.py"))}


def statements(node: ast.AST) -> Iterator[ast.Import | ast.ImportFrom]:
    """All imports, those inside functions too, but not what only a type checker reads."""
    for child in ast.iter_child_nodes(node):
        match child:
            case ast.Import() | ast.ImportFrom():
                yield child
            case ast.If(test=ast.Name(id="TYPE_CHECKING"), orelse=orelse):
                for other in orelse:
                    yield from statements(other)
            case _:
                yield from statements(child)


@cache
def imports(module: str) -> frozenset[str]:
    """The modules that this one imports: ours by their full name, others by that of their package."""
    found: set[str] = set()
    for statement in statements(ast.parse(MODULES[module].read_text())):
        if isinstance(statement, ast.Import):
            found |= {alias.name for alias in statement.names}
            continue
        assert statement.level == 0, f"{module} imports relatively"
        base = statement.module or ""
        found |= {full if (full := f"{base}.{alias.name}") in MODULES else base for alias in statement.names}
    return frozenset(name if name.partition(".")[0] in OURS else name.partition(".")[0] for name in found)


def who_imports(name: str) -> set[str]:
    """The modules that import ``name`` or something inside it."""
    return {
        module
        for module in MODULES
        if any(imported == name or imported.startswith(f"{name}.") for imported in imports(module))
    }


def inside(package: str) -> set[str]:
    return {module for module in MODULES if module == package or module.startswith(f"{package}.")}


def test_the_walk_finds_what_there_is() -> None:
    assert {"protocol.parse", "client", "client.aio", "bridge.worker.llama"} <= MODULES.keys()
    assert "client.blocking" in imports("client")
    assert "client.aio" in imports("client")  # inside a function
    assert {"protocol.errors", "msgspec"} <= imports("protocol.parse")


def test_the_wire_knows_nobody() -> None:
    assert not (who_imports("client") | who_imports("bridge")) & inside("protocol")
    assert not (who_imports("trio") | who_imports("socket")) & inside("protocol")


def test_clients_know_the_wire_alone() -> None:
    assert not who_imports("bridge") & inside("client")
    assert who_imports("trio") & inside("client") == {"client.aio", "client.aio_link"}


def test_the_thin_client_needs_msgspec_and_orjson_alone() -> None:
    thin = inside("client") | inside("protocol")
    foreign = {name for module in thin for name in imports(module) if name.partition(".")[0] not in OURS}
    assert foreign - sys.stdlib_module_names == {"msgspec", "orjson", "trio"}


def test_a_worker_knows_neither_the_wire_nor_trio() -> None:
    worker = inside("bridge.worker")
    for name in ("protocol", "client", "trio", "click", "structlog"):
        assert not who_imports(name) & worker, name
    ours = {name for module in worker for name in imports(module) if name.partition(".")[0] in OURS}
    assert ours - worker == {"bridge.frames", "bridge.ipc", "bridge.suit"}


def test_models_know_the_wire_alone() -> None:
    models = inside("bridge.models")
    for name in ("trio", "click", "structlog"):
        assert not who_imports(name) & models, name
    ours = {name for module in models for name in imports(module) if name.partition(".")[0] in OURS}
    assert ours - models - inside("protocol") <= {"bridge.suit"}
    assert not imports("bridge.suit") & MODULES.keys()


def test_the_engine_is_behind_one_door() -> None:
    behind = {module for module in MODULES if module.startswith("bridge.worker.llama")}
    assert who_imports("llama_cpp") <= behind
    others = {module: imports(module) & behind for module in MODULES.keys() - behind}
    assert {module: found for module, found in others.items() if found} == {
        "bridge.worker.__main__": {"bridge.worker.llama"},
        "bridge.worker.about": {"bridge.worker.llama_about"},
    }
    assert who_imports("bridge.worker") <= inside("bridge.worker")  # the daemon starts a worker, it does not import one


def test_what_only_some_install_is_imported_when_it_is_asked_for() -> None:
    assert who_imports("prometheus_client") == {"bridge.watching.prometheus"}
    assert who_imports("starlette") == {"bridge.watching.http_app"}
    assert who_imports("hypercorn") == {"bridge.watching.http_port"}
    lazy = "hypercorn", "prometheus_client", "starlette", "huggingface_hub", "llama_cpp"
    program = f"import sys, bridge.cli.serve; print(sys.modules.keys() & set({lazy}))"
    loaded = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd=ROOT)
    assert loaded.stdout == "set()\n"


def test_who_has_no_port_for_it_loads_neither_tls_nor_http() -> None:
    """They take memory. The program that fetches models is a process of its own."""
    assert who_imports("ssl") == {"bridge.access.tls", "bridge.models.download", "client.tls", "client.aio_link"}
    assert who_imports("bridge.access.tls") == {"bridge.access.gate"}
    assert (
        who_imports("bridge.watching.http_port") == who_imports("bridge.watching.http_app") == {"bridge.watching.ports"}
    )
    assert who_imports("bridge.watching.prometheus") == {"bridge.watching.http_app", "bridge.handlers.monitoring"}
    late = (
        "bridge.access.tls",
        "bridge.watching.http_app",
        "bridge.watching.http_port",
        "bridge.watching.prometheus",
        "bridge.jobs.store",
    )
    program = f"import sys, bridge.cli.serve; print(sys.modules.keys() & set({late}))"
    loaded = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd=ROOT)
    assert loaded.stdout == "set()\n"


def test_who_somebody_is_and_what_he_may_has_one_door_each() -> None:
    assert who_imports("bridge.access.users") == who_imports("bridge.access.guard") == {"bridge.access.gate"}
    assert who_imports("bridge.access.tokens") == {"bridge.access.gate", "bridge.cli.token"}
    assert who_imports("pwd") == {"bridge.access.users"}
    assert who_imports("hmac") == {"bridge.access.tokens"}
    assert who_imports("bridge.permission") == {"bridge.session", "bridge.job_answer", "bridge.handlers.submit"}
    assert who_imports("bridge.access.gate") == {"bridge.daemon", "bridge.server", "bridge.session"}


def test_only_handlers_translate_between_wire_and_worker() -> None:
    # bridge.pool.planner makes of LOAD's options, with what suits the machine, the worker's.
    both = who_imports("protocol.commands") & who_imports("bridge.ipc")
    assert both <= {
        "bridge.dispatch",
        "bridge.handlers.generation",
        "bridge.handlers.loading",
        "bridge.handlers.lora",
        "bridge.pool.planner",
    }


def test_the_log_has_one_door() -> None:
    """Who logs asks bridge.log; what is logged is what EVENTS tells; and the writer knows nothing of either."""
    assert who_imports("structlog") == {"bridge.log", "bridge.log.events"}
    assert who_imports("bridge.log.writer") == {"bridge.log"}
    assert who_imports("bridge.log.events") == {"bridge.log", "bridge.handlers.subscribing"}
    assert not imports("bridge.log.writer") & MODULES.keys()


@pytest.mark.parametrize(
    "module",
    [
        "bridge.pool.registry",
        "bridge.pool.entry",
        "bridge.pool.room",
        "bridge.access.roles",
        "bridge.access.config",
        "bridge.access.guard",
        "bridge.watching.health",
        "bridge.histogram",
        "bridge.intake",
        "bridge.jobs.job",
        "bridge.providers.turnover",
        "bridge.access.quota",
        "bridge.models.fit",
        "bridge.worker.scheduler",
    ],
)
def test_what_decides_does_not_act(module: str) -> None:
    assert not imports(module) & {"trio", "socket", "subprocess", "threading", "time"}


def test_the_database_is_behind_one_door() -> None:
    """And is not opened for who has no jobs: it takes memory."""
    assert who_imports("sqlite3") == {"bridge.jobs.store"}
    assert who_imports("bridge.jobs.store") == {"bridge.jobs.disk"}
    code = "import sys, bridge.server; assert 'bridge.jobs.disk' in sys.modules; assert 'sqlite3' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


def test_a_service_manager_is_spoken_to_by_few() -> None:
    assert not imports("bridge.service.systemd") & MODULES.keys()
    assert not imports("bridge.log.journal") & MODULES.keys()
    assert who_imports("bridge.log.journal") == {"bridge.log"}
    assert who_imports("bridge.service.systemd") == {
        f"bridge.{name}" for name in ("listeners", "cli.serve", "server", "service.standing", "service.watchdog")
    }


def test_no_module_imports_itself_by_a_detour() -> None:
    done: set[str] = set()

    def walk(module: str, way: tuple[str, ...]) -> None:
        assert module not in way, " -> ".join([*way[way.index(module) :], module])
        if module in done:
            return
        for imported in sorted(imports(module) & MODULES.keys()):
            walk(imported, (*way, module))
        done.add(module)

    for module in MODULES:
        walk(module, ())


def room(module: str) -> str:
    """The folder a module of the daemon is in; one that lies beside the folders is a room of its own."""
    return ".".join(module.split(".")[:2])


def test_rooms_know_each_other_one_way() -> None:
    """But for the pair named here: a section of the configuration is described where it is used."""
    known = {room(module): set[str]() for module in inside("bridge")}
    for module in inside("bridge"):
        known[room(module)] |= {room(name) for name in imports(module) & inside("bridge")}
    both = {(a, b) for a in known for b in known[a] if a < b and a in known[b]}
    assert both == {("bridge.access", "bridge.config")}


@pytest.mark.parametrize("module", ["pickle", "marshal", "shelve", "dill"])
def test_nothing_is_unpickled(module: str) -> None:
    assert not who_imports(module)
