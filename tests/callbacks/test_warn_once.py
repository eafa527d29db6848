"""Warnings that come once for each cause."""

from __future__ import annotations

import warnings

import pytest

from lightning_plasticity.callbacks.warn_once import WarnOnce


def said(*calls: tuple[str, ...]) -> list[str]:
    warn_once = WarnOnce("Owner")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for call in calls:
            warn_once(*call)
    return [str(entry.message) for entry in caught]


def test_a_cause_is_told_once_whatever_its_numbers() -> None:
    # 1e-05 and 3.5e+2 are one number each.
    found = said(("first", "loss 1e-05 at 7"), ("second", "loss 3.5e+2 at 12"), ("third", "loss nan at 7"))
    assert found == ["first", "third"]


def test_messages_without_a_cause_are_told_once_each() -> None:
    assert said(("3 units",), ("4 units",), ("3 units",)) == ["3 units", "4 units"]


def test_what_is_survived_is_told_unless_it_may_raise() -> None:
    calm = WarnOnce("Owner")
    told = pytest.warns(UserWarning, match=r"Owner could not write: OSError: No space left\. Training goes on\.")
    with told, calm.surviving("write"):
        raise OSError("No space left.")
    assert calm
    with pytest.raises(OSError, match="No space"), WarnOnce("Owner", raising=True).surviving("write"):
        raise OSError("No space left")
