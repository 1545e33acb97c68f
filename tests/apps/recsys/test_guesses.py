"""What a column holds and gives away: guesses, planted leaks of every kind, and clean tables."""

import datetime as dt
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from apps.data.given import GivenData
from apps.recsys.guesses import guess, words_of
from apps.recsys.own_table import config_for
from apps.recsys.tables.data import TableData

DAYS = range(1, 25)
SECONDS = [1_717_113_600 + 86_400 * i for i in range(24)]  # 2024-05-31 to 2024-06-23


def of(values, name="column", kind=None):
    found = guess(name, pa.chunked_array([pa.array(values, kind)]))
    return found.role, found.reason


@pytest.mark.parametrize(
    ("name", "values", "role", "reason"),
    [
        ("order", range(100), "id", "it counts the rows"),
        ("userId", [7, 3, 9, 1, 8] * 4 + list(range(10, 400)), "id", "its name, and another value in nearly every row"),
        ("code", [f"x{i}" for i in range(50)], "id", "another value in every row"),
        ("user_id", [7, 3, 9, 1] * 10, "category", "4 integers, 1 to 9"),
        ("town", ["Oslo", "Rome", " Oslo", ""] * 5, "category", "2 texts, such as 'Oslo', 7.5 rows each"),
        ("grade", [1, 2, 3] * 5, "category", "3 integers, 1 to 3"),
        ("is_new", [True, False], "category", "2 values, such as True"),
        ("heat", [-1.5, 2.25, 3.0], "number", "-1.5 to 3"),
        ("heat", [i + 0.99 for i in range(150)], "number", "0.99 to 149.99"),
        ("change", [4, -3, *range(25)], "number", "integers, -3 to 24"),
        ("visits", [5, *range(25)], "count", "integers, 0 to 24"),
        ("price", [1.5, 2.25, 1234.5], "money", "1.5 to 1,234.5, two decimals"),
        ("paid", [i + 0.99 for i in range(150)], "money", "0.99 to 149.99, two decimals"),
        ("tags", ["a|b", "b|c", "a", "c|a|b"] * 5, "list", "3 values between '|', 2.0 per row"),
        ("about", [f"a red hat, {i}" for i in range(30)], "text", "4 words per row, such as 'a red hat, 0'"),
        ("place", [[i + 0.5, 1.5] for i in range(9)], "vector", "lists of 2 numbers"),
        ("same", ["x"] * 9, "unused", "'x' in every row"),
        ("half", [1, None, 1], "unused", "1 in every row that has a value"),
        ("none", [None, ""], "unused", "no value in any row"),
        ("paid", [f"${i},000.00" for i in range(1, 30)], "unused", "numbers such as '$1,000.00'"),
        ("size", [*map(str, range(30)), "many"], "unused", "numbers, but also 'many'"),
        ("zip", [*map(str, range(30)), "K1A"] * 10, "category", "31 texts, such as '0' and 'K1A'"),
        ("place", [f"[{i}.5, 1.5]" for i in range(9)], "unused", "vectors of 2 numbers in text"),
        ("raw", [b"\xe9", b"a"], "unused", "bytes that are no UTF-8 text"),
    ],
)  # fmt: skip
def test_roles_and_reasons(name, values, role, reason):
    assert of(list(values), name) == (role, reason)


@pytest.mark.parametrize(
    "values",
    [[dt.date(2024, 6, day) for day in DAYS], [dt.datetime(2024, 6, day) for day in DAYS],
     [f"2024-06-{day:02}" for day in DAYS], [f"2024/6/{day}" for day in DAYS], [f"{day:02}.06.2024" for day in DAYS],
     [f"6/{day}/2024" for day in DAYS], [f"2024-06-{day:02}T02:00:00+02:00" for day in DAYS],
     [*(f"6/{day}/2024 0:00" for day in DAYS), "NA", ""], [20240600 + day for day in DAYS],
     [86_400 + second for second in SECONDS], [1000 * (86_400 + second) for second in SECONDS],
     [10**9 * (86_400 + second) for second in SECONDS]],
)  # fmt: skip
def test_dates_of_every_form(values):
    role, reason = of(values)
    assert role == "date"
    assert reason.endswith("2024-06-01 to 2024-06-24")


def test_what_is_no_date_and_no_list():
    found = guess("day", pa.chunked_array([[f"{day}/01/2024" for day in DAYS]]))  # slashes have the month first
    assert (found.role, found.advice) == ("unused", "they are from 1950 to 2100, such as 2024-05-31")
    assert of([dt.date(2999, 1, day) for day in DAYS]) == ("unused", "dates that are not read, such as '2999-01-01'")
    assert of(list(range(1_000_000_000, 1_000_000_050)))[0] == "id"  # they count, from 2001 on if they were seconds
    assert of(SECONDS * 2, "product_id")[0] == "category"
    assert of([20240600 + day for day in (3, 31, *DAYS)])[0] == "count"  # June has 30 days
    assert words_of("userId2") == words_of("user_id") == words_of("User ID") == ["user", "id"]
    towns = ["Boston, MA", "Salem, OR", "Austin, TX"] * 5  # six parts make three texts
    assert of(towns) == ("category", "3 texts, such as 'Boston, MA', 5.0 rows each")
    assert of([f"a{i}|b{i}" for i in range(20)])[0] == "id"
    assert of([[i, -i] for i in range(20)])[1] == "lists whose values do not recur"
    assert of([[[1]], [[2]]])[1] == "lists of lists or of records"


@pytest.mark.parametrize(
    ("values", "separator"),
    [(["a|b", "b", "a|b|c", "c|a"], "|"), (["a;b", "b", "a;b;c", "c;a"], ";"),
     (["a, b", "b", "a, b, c", "c, a"], ","), (['["a", "b"]', '["b"]', '["a"]', "[]"], None),
     (["['a', 'b']", "['b']", "['a']", "[]"], None), ([["a", "b"], ["b"], ["a"], []], None),
     ([[1, 2], [2], [1], []], None)],
)  # fmt: skip
def test_lists_of_every_form(values, separator):
    found = guess("tags", pa.chunked_array([pa.array(values * 5)]))
    assert (found.role, found.separator) == ("list", separator)


N, USERS = 1600, 200


class Shop:
    """Rows of users who click at their own rates, in a random order."""

    def __init__(self, seed: int) -> None:
        self.rng = rng = np.random.default_rng(seed)
        self.user = rng.integers(0, USERS, N)
        self.rate = 1 / (1 + np.exp(0.8 - rng.normal(size=USERS)))
        self.clicked = (rng.random(N) < self.rate[self.user]).astype(int)
        self.day = rng.permutation(N)
        self.table: dict[str, Any] = {
            "user": [f"u{own}" for own in self.user],
            "day": [str(dt.date(2015, 1, 1) + dt.timedelta(int(own))) for own in self.day],
            "age": rng.integers(18, 80, USERS)[self.user],
            "price": rng.gamma(2, 9, N).round(2),
            "town": rng.choice(["Oslo", "Rome", "Bern", "Kyiv"], N),
            "clicked": self.clicked,
        }

    def some(self, share: float) -> np.ndarray:
        """Return a share of the rows with a click."""
        return (self.clicked == 1) & (self.rng.random(N) < share)

    def by_user(self, weights: np.ndarray) -> np.ndarray:
        return np.bincount(self.user, weights=weights, minlength=USERS)

    def earlier(self, weights: np.ndarray, inclusive: bool = False) -> np.ndarray:
        """Return the sum over the user's rows of earlier days."""
        order = np.lexsort((self.day, self.user))
        total = np.zeros(N)
        for i, row in enumerate(order):
            before = order[i - 1] if i and self.user[order[i - 1]] == self.user[row] else None
            total[row] = weights[row] + (total[before] if before is not None else 0)
        return total if inclusive else total - weights


def later(day: str, is_later: bool) -> str:
    return str(dt.date.fromisoformat(day) + dt.timedelta(3 * int(is_later)))


def _when(mask, values):
    return [value if is_in else None for is_in, value in zip(mask, values, strict=True)]


LEAKS = {
    "0/1": lambda s: {"bought": s.some(0.3).astype(int)},
    "yes or no": lambda s: {"paid_it": np.where(s.some(0.4), "yes", "no")},
    "text": lambda s: {"note": _when(s.some(0.5), [f"thanks for order number {i}" for i in range(N)])},
    "text of a few kinds": lambda s: {"status": np.where(s.some(0.5), "in the cart", s.rng.choice(["a b", "c d"], N))},
    "amount": lambda s: {"revenue": np.where(s.some(0.4), s.rng.gamma(2, 20, N).round(2), 0.0)},
    "amount that is missing": lambda s: {"spend": _when(s.some(0.4), s.rng.gamma(2, 20, N).round(2).tolist())},
    "date": lambda s: {"left_at": _when(s.some(0.6), s.table["day"])},
    "later date": lambda s: {"changed": [later(*own) for own in zip(s.table["day"], s.some(0.7), strict=True)]},
    "category": lambda s: {"page": np.where(s.some(0.5), "checkout", s.rng.choice(["home", "list", "item"], N))},
    "code of the label": lambda s: {"state": np.where(s.clicked, s.rng.choice([7, 9], N), s.rng.choice([1, 4], N))},
    "id": lambda s: {"order_id": _when(s.some(0.5), [f"o{i}" for i in range(N)])},
    "id that grows with the label": lambda s: {"session_id": s.clicked * 10**6 + s.rng.integers(0, 10**6, N)},
    "mean of the user's labels": lambda s: {"rate": s.by_user(s.clicked)[s.user] / s.by_user(np.ones(N))[s.user]},
    "smoothed mean": lambda s: {"rate": ((s.by_user(s.clicked) + 3) / (s.by_user(np.ones(N)) + 10))[s.user].round(3)},
    "mean of the other labels": lambda s: {
        "rate": ((s.by_user(s.clicked)[s.user] - s.clicked) / np.maximum(s.by_user(np.ones(N))[s.user] - 1, 1))
    },
    "clicks until this row": lambda s: {"clicks": s.earlier(s.clicked, inclusive=True)},
    "later rows": lambda s: {"to_come": s.by_user(np.ones(N))[s.user] - s.earlier(np.ones(N), inclusive=True)},
    "later clicks": lambda s: {"to_come": s.by_user(s.clicked)[s.user] - s.earlier(s.clicked, inclusive=True)},
    "list": lambda s: {"tags": [["a", "done"] if m else [["b"], ["a", "b"]][i % 2] for i, m in enumerate(s.some(0.6))]},
    "rows that repeat": lambda s: {},
}
"""Columns that are not known before the label, by kind."""


def _clean(s: Shop) -> dict[str, dict[str, Any]]:
    rng, n, y = s.rng, s.by_user(np.ones(N)), s.clicked
    ones = np.ones(N)
    strong = y * 2.2 + rng.normal(size=N)
    sessions = np.repeat(np.arange(N // 4), 4)
    return {
        "plain": {},
        "rows before": {"visits": s.earlier(ones)},
        "clicks before": {"clicks": s.earlier(y)},
        "rate before": {"rate": s.earlier(y) / np.maximum(s.earlier(ones), 1)},
        "true rate": {"rate": s.rate[s.user]},
        "rate of last year": {"rate": rng.binomial(20, s.rate)[s.user] / 20},
        "visits of the user": {"visits": n[s.user]},
        "strong number": {"score": strong},
        "strong category": {"grade": np.digitize(strong, [-1, 0, 1, 2])},
        "missing by chance": {"height": _when(rng.random(N) < 0.5, strong.tolist())},
        "mostly zeros": {"spend": np.where(rng.random(N) < 0.2, rng.gamma(2, 9, N), 0)},
        "a default, which is known before": {"default": (rng.random(N) < 0.2 + 0.2 * y).astype(int)},
        "children, who never click": {"kind": np.where((y == 0) & (rng.random(N) < 0.3), "child", "grown")},
        "many categories": {"plate": [f"p{own}" for own in rng.integers(0, 400, N)]},
        "two dates": {"joined": [f"2014-{1 + i % 12:02}-{1 + i % 28:02}" for i in s.user]},
        "list": {"tags": [["a", "b"] if i % 3 else ["c"] for i in range(N)]},
        "one click for each session": {
            "session": [f"s{own}" for own in sessions],
            "sites": rng.integers(1, 99, N // 4)[sessions],
            "clicked": (np.arange(N) % 4 == rng.integers(0, 4, N // 4)[sessions]).astype(int),
        },
        "few values": {"age": None, "price": None, "day": None, "user": None, "size": rng.choice(["S", "M", "L"], N)},
        "an amount": {"clicked": np.where(y, rng.gamma(2, 20, N) * (1 + s.rate[s.user]), 0).round(2)},
        "one in twenty": {"clicked": (rng.random(N) < 0.05).astype(int)},
    }


CLEAN = list(_clean(Shop(0)))


def read(tmp_path, table: dict[str, Any], time: str | None = None):
    path = tmp_path / "shop.parquet"
    pq.write_table(pa.table({name: pa.array(own) for name, own in table.items() if own is not None}), path)
    return config_for(GivenData((path,), "clicked", tmp_path / "x", time=time))


def said_by_fit(made, tmp_path, columns: list[str]) -> list[str]:
    """Return the warnings of a training whose configuration a person wrote: it has the columns that were left out."""
    given = made.config["data"]["init_args"]
    table = {**given["table"], "min_count": 1}
    for column, role in columns:
        table[role] = [*table.get(role, []), column]
    data = TableData(**{**given, "table": table}, cache_dir=str(tmp_path / "cache"))
    return data.warnings()


ROLES = {"note": "vectors", "left_at": "timestamps", "changed": "timestamps", "tags": "multi_valued"}
CATEGORIES = ("bought", "paid_it", "status", "page", "state", "order_id")


@pytest.mark.parametrize("kind", LEAKS)
def test_a_leak_is_named_by_init_and_by_fit(kind, tmp_path):
    shop = Shop(list(LEAKS).index(kind))
    leak = LEAKS[kind](shop)
    table = shop.table | leak
    if not leak:  # every tenth row once more
        table = {name: np.concatenate((own, np.asarray(own)[::10])) for name, own in table.items()}
    made = read(tmp_path, table)
    if not leak:
        assert made.warnings[-1] == (
            "160 rows of 1,760 repeat other rows, label included: leave them out, or they are trained on and tested"
        )
        assert any("test rows repeat a training row" in line for line in said_by_fit(made, tmp_path, []))
        return
    (name,) = leak
    assert any(line.startswith(f"{name} is left out: ") for line in made.warnings), made.warnings
    table = made.config["data"]["init_args"]["table"]
    assert all(name not in table.get(role, []) for role in ("categorical", "continuous", "multi_valued", "timestamps"))
    if name == "note":  # a text is a vector to a model; what init says is enough
        return
    role = ROLES.get(name, "categorical" if name in CATEGORIES else "continuous")
    assert any(f"column '{name}" in line for line in said_by_fit(made, tmp_path, [(name, role)])), "fit"


def test_a_few_large_labels_are_no_sign_that_a_sum_includes_them(tmp_path):
    shop = Shop(106)
    spent = np.where(shop.clicked, shop.rng.lognormal(3, 2.5, N), 0).round(2)
    assert read(tmp_path, shop.table | {"clicked": spent, "spent_before": shop.earlier(spent)}).warnings == ()


def test_clean_tables_raise_no_alarm(tmp_path):
    alarms = []
    for i, kind in enumerate(CLEAN):
        shop = Shop(100 + i)
        made = read(tmp_path, shop.table | _clean(shop)[kind])
        alarms += [(kind, line) for line in made.warnings]
        asks = ("is it known before", "repeat a training row")
        alarms += [(kind, line) for line in said_by_fit(made, tmp_path, []) if any(own in line for own in asks)]
    assert alarms == []
