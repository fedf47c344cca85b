"""Attributes and methods in compiled modules are what Python says they are, whatever was remembered of them before.

One place in C sees objects of all layouts in turn, and classes and instances change between two looks.
"""

from __future__ import annotations

import enum
import importlib.util
import random
import sys
import sysconfig
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import pytest

from profiler.replay import compiler

pytest.importorskip("Cython", reason="the `compile` extra is not installed")

SITES = """
def get(item):
    return item.value


def call(item, number):
    return item.value(number)


def look_again(item, times):
    for _ in range(times):
        item.value
"""
STEPS = 4_000


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("sites")


@pytest.fixture
def sites(folder: Path) -> types.ModuleType:
    """A module of its own for every test: its places in C remember nothing yet."""
    name = "sites"
    suffix = sysconfig.get_config_var("EXT_SUFFIX")
    if not (built := folder / f"{name}{suffix}").exists():
        (folder / f"{name}.py").write_text(SITES)
        target = compiler.Target(sys.version, suffix, sysconfig.get_paths()["include"], "0", (str(folder),))
        compiler._compile(name, folder / f"{name}.py", folder, target, compiler._c_compiler())
    # Another file: the dynamic linker loads one file once.
    copy = folder / f"{len(list(folder.iterdir()))}{suffix}"
    copy.write_bytes(built.read_bytes())
    spec = importlib.util.spec_from_file_location(name, copy)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def outcome(look: Callable[[], Any]) -> Any:
    """What came of it; bound methods are equal where function and object are the same."""
    try:
        return look()
    except Exception as error:  # noqa: BLE001  compared with what Python raises
        return type(error), str(error)


def check(sites: types.ModuleType, item: Any) -> None:
    assert outcome(lambda: sites.get(item)) == outcome(lambda: item.value)
    assert outcome(lambda: sites.call(item, 3)) == outcome(lambda: item.value(3))


class Plain:
    pass


class Method:
    def value(self, number: int) -> tuple[str, int, int]:
        return "method", id(self), number


class Derived(Method):
    pass


class Property:
    @property
    def value(self) -> Any:
        if getattr(self, "broken", False):
            raise AttributeError("no such value today")
        return "property", id(self)


class Static:
    @staticmethod
    def value(number: int) -> tuple[str, int]:
        return "static", number


class Class:
    @classmethod
    def value(cls, number: int) -> tuple[str, str, int]:
        return "class", cls.__name__, number


class Slots:
    __slots__ = ("value",)


class MethodAndSlots:
    __slots__ = ("other",)

    def value(self, number: int) -> tuple[str, int]:
        return "method beside slots", number


class Dynamic:
    def __getattr__(self, name: str) -> Any:
        return f"made-up {name}"


class Intercepting:
    value = 1

    def __getattribute__(self, name: str) -> Any:
        return f"intercepted {name}"


class Wide:
    """More attributes than instances share keys for: the instance has a dictionary from its start."""

    def __init__(self) -> None:
        for number in range(40):
            setattr(self, f"attribute_{number}", number)


class Struct(msgspec.Struct):
    value: Any = None


class Pair(NamedTuple):
    value: Any
    other: int


class Number(enum.IntEnum):
    ONE = 1


class Text(str):
    __slots__ = ()

    def value(self, number: int) -> str:
        return self * number


def objects() -> list[Any]:
    with_value, wide, slots, struct, broken = Plain(), Wide(), Slots(), Struct(len), Property()
    for item, value in ((with_value, abs), (wide, str), (slots, repr)):
        setattr(item, "value", value)  # noqa: B010  no such name stands in the class
    vars(broken)["broken"] = True
    classes = [Plain, Method, Derived, Property, Static, Class, Slots, MethodAndSlots, Dynamic, Intercepting, Wide]
    made = [made_of() for made_of in classes]
    others = [with_value, wide, slots, struct, broken, Pair(hex, 2), Number.ONE, Text("ab"), 5, None, [], Method, sys]
    return [*made, *others]


def test_one_place_sees_objects_of_all_layouts(sites: types.ModuleType) -> None:
    items = objects()
    for _ in range(3):
        for item in items:
            for _ in range(3):
                check(sites, item)


@pytest.fixture
def classes() -> list[type]:
    """Classes that may be changed, and one that inherits from another."""
    made: list[type] = []
    for kind in (Plain, Method, Property, Slots, MethodAndSlots, Wide):
        namespace = {name: content for name, content in vars(kind).items() if name not in ("__dict__", "__weakref__")}
        if "__slots__" in namespace:
            for name in namespace["__slots__"]:
                del namespace[name]
        made.append(type(kind.__name__, (), namespace))
    return [*made, type("Derived", (made[1],), {}), type("Other", (made[0],), {})]


def test_nothing_remembered_outlives_a_change(sites: types.ModuleType, classes: list[type]) -> None:
    draw = random.Random(7)
    items: list[Any] = [kind() for kind in classes for _ in range(3)]
    contents: list[Callable[[], Any]] = [
        lambda: lambda *numbers: ("function", numbers),
        lambda: property(lambda item: ("a property of", id(item))),
        lambda: 5,
        lambda: staticmethod(abs),
        lambda: classmethod(lambda kind, number: (kind.__name__, number)),
    ]

    def change_class(item: Any) -> None:
        kind: Any = draw.choice(type(item).__mro__[:-1])
        if "value" in vars(kind) and draw.random() < 0.5:
            del kind.value
        else:
            kind.value = draw.choice(contents)()

    def set_value(item: Any) -> None:
        item.value = draw.choice([abs, str, 7])

    def delete_value(item: Any) -> None:
        del item.value

    def add_others(item: Any) -> None:
        for number in range(draw.randrange(4)):
            setattr(item, f"added_{number}", number)

    def have_dictionary(item: Any) -> None:
        assert isinstance(vars(item), dict)

    def reach_into_dictionary(item: Any) -> None:
        # Equal to the name in the C, and another object.
        vars(item)["".join(["val", "ue"])] = draw.choice([abs, 8])

    def replace_dictionary(item: Any) -> None:
        item.__dict__ = dict(draw.sample(sorted(vars(item).items(), key=lambda entry: entry[0]), len(vars(item))))

    def become_another(item: Any) -> None:
        item.__class__ = draw.choice(classes)

    changes = [
        change_class,
        set_value,
        delete_value,
        add_others,
        have_dictionary,
        reach_into_dictionary,
        replace_dictionary,
        become_another,
    ]
    done = dict.fromkeys(changes, 0)
    for step in range(STEPS):
        place = draw.randrange(len(items))
        change = draw.choice(changes)
        try:
            change(items[place])
            done[change] += 1
        except (AttributeError, TypeError):
            # Such an object cannot be changed so.
            pass
        check(sites, items[place])
        check(sites, draw.choice(items))
        if step % 50 == 0:
            items[place] = draw.choice(classes)()
    assert min(done.values()) > STEPS / 100


def test_a_method_called_is_the_instance_s_own_once_it_has_one(sites: types.ModuleType) -> None:
    first: Any = Method()
    second: Any = Method()
    for item in (first, second, first):
        check(sites, item)
    second.value = lambda number: ("own", number)
    assert sites.call(second, 1) == ("own", 1)
    assert sites.call(first, 1)[0] == "method"
    vars(first)["value"] = len
    with pytest.raises(TypeError, match="int"):
        sites.call(first, 1)


def owners() -> Iterator[Any]:
    for kind in (Plain, Wide, Slots, Struct):
        item: Any = kind()
        item.value = object()
        yield item
    yield Pair(object(), 1)


@pytest.mark.parametrize("item", list(owners()), ids=lambda item: type(item).__name__)
def test_no_reference_is_kept_or_lost(sites: types.ModuleType, item: Any) -> None:
    value, kind = item.value, type(item)
    before = sys.getrefcount(value), sys.getrefcount(item), sys.getrefcount(kind)
    sites.look_again(item, 1_000)
    assert (sys.getrefcount(value), sys.getrefcount(item), sys.getrefcount(kind)) == before


def test_no_reference_to_a_method_is_kept_or_lost(sites: types.ModuleType) -> None:
    item, function = Method(), Method.value
    before = sys.getrefcount(function), sys.getrefcount(item)
    for _ in range(1_000):
        sites.call(item, 1)
    sites.look_again(item, 1_000)
    assert (sys.getrefcount(function), sys.getrefcount(item)) == before


def test_cython_s_calls_are_where_the_cache_is_put(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A Cython that writes other calls would leave compiled modules right and a fifth slower, in silence."""
    texts: list[str] = []
    put = compiler._cache_attributes

    def see(c_file: Path) -> None:
        put(c_file)
        texts.append(c_file.read_text())

    monkeypatch.setattr(compiler, "_cache_attributes", see)
    (tmp_path / "sites.py").write_text(SITES)
    target = compiler.Target(sys.version, ".so", sysconfig.get_paths()["include"], "0", (str(tmp_path),))
    compiler._compile("sites", tmp_path / "sites.py", tmp_path, target, "true")
    (text,) = texts
    assert text.count("STEP_ORACLE_GET_ATTRIBUTE(__pyx_v_item") == 2
    assert text.count("STEP_ORACLE_CALL_METHOD(") == 1
