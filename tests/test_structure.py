"""The house rules that no other test would notice: floors, who may ask for the rank, cheap imports, short files."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import megarl

PACKAGE = Path(megarl.__file__).parent
ROOT = PACKAGE.parent

# An import points down, or sideways inside a room. The first that a path starts with decides.
FLOORS = {
    "config/": 0,
    "functions/": 0,
    "errors.py": 0,
    "command.py": 0,
    "logging.py": 0,
    "progress.py": 0,
    "clock.py": 0,
    "disk.py": 0,
    "heartbeat.py": 0,
    "__init__.py": 0,
    "algorithms/": 1,
    "tasks/": 1,
    "chat/": 1,
    "tokenizers/": 1,
    "trials/": 1,
    "report/": 1,
    "parallel/": 2,
    "models/": 3,
    "checkpoint.py": 3,
    "rollout/": 4,
    "rewards/": 4,
    "data/": 4,
    "experience/": 5,
    "modules/": 6,
    "callbacks/": 6,
    "run/": 7,
    "conformance/": 7,
    "planning/": 7,
    "serving/": 7,
    "watch/": 7,
    "compat/": 9,
    "project/": 8,
    "": 8,  # entry points
}
# Rooms of one floor that are built of one another, and in which direction.
BESIDE = {
    ("tokenizers/", "chat/"),
    ("checkpoint.py", "models/"),
    ("models/", "checkpoint.py"),
    ("run/", "planning/"),
}
HEAVY = ("torch", "megatron", "transformers", "lightning")
LONGEST = 500


def sources() -> list[Path]:
    return sorted(PACKAGE.rglob("*.py"))


def room(path: Path) -> str:
    name = path.relative_to(PACKAGE).as_posix()
    return next(start for start in FLOORS if name.startswith(start))


def module_path(name: str) -> Path | None:
    """The file of a module of megarl; None for a name that is something inside a module."""
    base = ROOT / name.replace(".", "/")
    candidates = (base.with_suffix(".py"), base / "__init__.py")
    return next((path for path in candidates if path.is_file()), None)


def imports(path: Path) -> Iterator[tuple[int, str]]:
    """(line, module) of every import in a file, those inside functions and of types included."""
    package = path.relative_to(ROOT).parent.parts
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            origin = [*package[: len(package) - node.level + 1]] if node.level else []
            base = ".".join([*origin, *([node.module] if node.module else [])])
            for alias in node.names:
                inside = f"{base}.{alias.name}"
                is_module = base.split(".")[0] == "megarl" and module_path(inside) is not None
                yield node.lineno, inside if is_module else base


def test_every_file_has_its_floor() -> None:
    folders = {path.relative_to(PACKAGE).parts[0] for path in sources() if path.parent != PACKAGE}
    assert {f"{folder}/" for folder in folders} <= FLOORS.keys()


FACE = ROOT / "megarl" / "__init__.py"
"""What `import megarl` shows of the top floor, imported when it is asked for."""


def test_imports_point_down_or_sideways() -> None:
    wrong = []
    for path in sources():
        here = room(path)
        for line, name in imports(path):
            target = module_path(name) if name.split(".")[0] == "megarl" else None
            if target is None or path == FACE:
                continue
            there = room(target)
            sideways = here == there or (here, there) in BESIDE
            if FLOORS[there] > FLOORS[here] or (FLOORS[there] == FLOORS[here] not in (0, 8) and not sideways):
                wrong.append(f"{path.relative_to(ROOT)}:{line} imports {name}")
    assert not wrong, "\n".join(wrong)


def circles(edges: dict[Path, set[Path]]) -> list[list[str]]:
    """Groups of files that import one another, directly or through others (Tarjan's strongly connected components)."""
    index: dict[Path, int] = {}
    lowest: dict[Path, int] = {}
    stack: list[Path] = []
    found: list[list[str]] = []

    def visit(path: Path) -> None:
        index[path] = lowest[path] = len(index)
        stack.append(path)
        for following in edges[path]:
            if following not in index:
                visit(following)
                lowest[path] = min(lowest[path], lowest[following])
            elif following in stack:
                lowest[path] = min(lowest[path], index[following])
        if lowest[path] == index[path]:
            start = stack.index(path)
            group, stack[start:] = stack[start:], []
            if len(group) > 1 or path in edges[path]:
                found.append(sorted(str(member.relative_to(ROOT)) for member in group))

    for path in edges:
        if path not in index:
            visit(path)
    return found


def test_no_module_imports_itself_through_others() -> None:
    """Imports inside functions and of types included: each file can be read with those below it alone."""
    edges: dict[Path, set[Path]] = {}
    for path in sources():
        targets = {module_path(name) for _, name in imports(path) if name.split(".")[0] == "megarl"}
        edges[path] = {target for target in targets if target is not None} - {FACE}
    assert not circles(edges)


def test_a_circle_of_imports_is_seen() -> None:
    a, b, c, d = (ROOT / name for name in "abcd")
    assert circles({a: {b}, b: {c}, c: {a, d}, d: set()}) == [["a", "b", "c"]]
    assert circles({a: {b, c}, b: {d}, c: {d}, d: set()}) == []


def names_in(path: Path) -> Iterator[tuple[int, str]]:
    """(line, dotted name) of every attribute that is read, such as torch.distributed.get_rank."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        parts: list[str] = []
        inner: ast.AST = node
        while isinstance(inner, ast.Attribute):
            parts.append(inner.attr)
            inner = inner.value
        if parts and isinstance(inner, ast.Name):
            yield node.lineno, ".".join([inner.id, *reversed(parts)])


def test_only_the_parallel_floor_knows_ranks_and_megatrons_globals() -> None:
    wrong = []
    for path in sources():
        if FLOORS[room(path)] <= 2:
            continue
        found = [(line, name) for line, name in imports(path) if "parallel_state" in name]
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom):
                taken = {alias.name for alias in node.names} & {"get_rank", "get_world_size", "parallel_state", "mpu"}
                found += [(node.lineno, f"{node.module}.{name}") for name in taken]
        found += [
            (line, name)
            for line, name in names_in(path)
            if name.endswith(("distributed.get_rank", "dist.get_rank")) or ".parallel_state." in f".{name}."
        ]
        wrong += [f"{path.relative_to(ROOT)}:{line} uses {name}" for line, name in sorted(set(found))]
    assert not wrong, "\n".join(wrong)


def test_only_two_files_know_which_library_multiplies() -> None:
    """What a processor makes of a product shows in no file that says what is multiplied."""
    known = {PACKAGE / "parallel" / "products.py", PACKAGE / "models" / "linear.py"}
    hooks = {"by_onednn", "onednn_is_faster", "pad_rows", "mkldnn"}
    wrong = [
        f"{path.relative_to(ROOT)}:{node.lineno}"
        for path in sources()
        if path not in known
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if (
            isinstance(node, ast.Name | ast.Attribute)
            and (node.id if isinstance(node, ast.Name) else node.attr) in hooks
        )
    ]
    assert not wrong, "\n".join(wrong)


def entry_points() -> list[str]:
    return [
        "megarl",
        "megarl.config",
        "megarl.rm_train",
        "megarl.evaluate",
        *sorted(f"megarl.{path.stem}" for path in PACKAGE.glob("train_*.py")),
    ]


@pytest.mark.parametrize("name", entry_points())
def test_importing_an_entry_point_is_cheap(name: str) -> None:
    program = f"import sys, {name}; print(*sorted({set(HEAVY)} & sys.modules.keys()))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout.split() == []


def test_no_file_is_longer_than_can_be_read() -> None:
    lengths = {str(path.relative_to(ROOT)): len(path.read_text(encoding="utf-8").splitlines()) for path in sources()}
    assert not {name: length for name, length in lengths.items() if length > LONGEST}


PLACED_BY_THEIR_CATCHER = {"UnreadableError", "AnswerError", "CallFailedError", "TemplateError"}
"""Errors that state a problem only: whoever catches them adds the key and the place."""


def error_kinds() -> set[str]:
    """Names of the errors that are reported in one line."""
    kinds = {"MegarlError"}
    while True:
        more = {
            node.name
            for path in sources()
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
            if isinstance(node, ast.ClassDef) and kinds & {base.id for base in node.bases if isinstance(base, ast.Name)}
        }
        if more <= kinds:
            return kinds - PLACED_BY_THEIR_CATCHER
        kinds |= more


def test_every_error_says_its_key_or_its_place_as_data() -> None:
    kinds, wrong = error_kinds(), []
    for path in sources():
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in kinds):
                continue
            if not {keyword.arg for keyword in node.keywords} & {"key", "where", None}:
                wrong.append(f"{path.relative_to(ROOT)}:{node.lineno} {node.func.id}")
    assert not wrong, "\n".join([f"{len(wrong)} errors", *wrong])


# What the standard library of the oldest supported Python, 3.10, does not have; ruff and mypy see newer syntax only.
FROM_3_11 = {
    "typing": {"Self", "Unpack", "TypeVarTuple", "Required", "NotRequired", "LiteralString", "Never", "assert_never"},
    "enum": {"StrEnum"},
    "datetime": {"UTC"},
    "contextlib": {"chdir"},
    "asyncio": {"TaskGroup", "timeout"},
}


def test_the_package_imports_nothing_that_python_3_10_lacks() -> None:
    """For type checkers it may: annotations are not evaluated."""
    found = []
    for path in sources():
        tree = ast.parse(path.read_text(encoding="utf-8"))
        seen = {id(node) for block in ast.walk(tree) if _for_types(block) for node in ast.walk(block)}
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and id(node) not in seen:
                absent = {alias.name for alias in node.names} & FROM_3_11.get(node.module or "", set())
                found += [f"{path.relative_to(ROOT)}:{node.lineno} {node.module}.{name}" for name in sorted(absent)]
            elif isinstance(node, ast.Import) and any(alias.name == "tomllib" for alias in node.names):
                found.append(f"{path.relative_to(ROOT)}:{node.lineno} tomllib")
    assert not found, "\n".join(found)


def _for_types(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"
