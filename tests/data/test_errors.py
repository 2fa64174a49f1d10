import pickle

import pytest

from data import errors
from data.errors import CheckpointError, StoreError, TeachOnceError, UsageError


def every_error() -> list[type[TeachOnceError]]:
    return [found for found in vars(errors).values() if isinstance(found, type) and issubclass(found, TeachOnceError)]


@pytest.mark.parametrize("kind", every_error())
def test_an_error_keeps_its_message_and_hint_through_pickle(kind: type[TeachOnceError]) -> None:
    returned = pickle.loads(pickle.dumps(kind("what is wrong", hint="what to run")))
    assert type(returned) is kind
    assert (returned.message, returned.hint) == ("what is wrong", "what to run")


def test_an_error_shows_its_hint_as_the_next_step() -> None:
    assert str(TeachOnceError("wrong", hint="run this")) == "wrong\n  next: run this"
    assert str(TeachOnceError("wrong")) == "wrong"


@pytest.mark.parametrize("kind", every_error())
def test_exit_codes_are_those_of_the_tree(kind: type[TeachOnceError]) -> None:
    is_store = issubclass(kind, StoreError | CheckpointError)
    assert kind.exit_code == (2 if issubclass(kind, UsageError) else 3 if is_store else 1)


@pytest.mark.parametrize("kind", every_error())
def test_the_module_shows_every_error_in_its_tree(kind: type[TeachOnceError]) -> None:
    assert f"{kind.__name__} " in str(errors.__doc__)
