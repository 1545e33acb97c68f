"""What a column holds, from its name and values."""

import datetime as dt

import pyarrow as pa
import pytest

from apps.recsys.guesses import guess, words_of

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
        ("place", [f"[{i}.5, 1.5]" for i in range(9)], "unused", "vectors of 2 numbers in text"),
        ("raw", [b"\xe9", b"a"], "unused", "bytes that are no UTF-8 text"),
    ],
)  # fmt: skip
def test_roles_and_reasons(name, values, role, reason):
    assert of(list(values), name) == (role, reason)


@pytest.mark.parametrize(
    "values",
    [
        [dt.date(2024, 6, day) for day in DAYS],
        [dt.datetime(2024, 6, day) for day in DAYS],
        [f"2024-06-{day:02}" for day in DAYS],
        [f"2024/6/{day}" for day in DAYS],
        [f"{day:02}.06.2024" for day in DAYS],
        [f"6/{day}/2024" for day in DAYS],
        [f"2024-06-{day:02}T02:00:00+02:00" for day in DAYS],
        [*(f"6/{day}/2024 0:00" for day in DAYS), "NA", ""],
        [20240600 + day for day in DAYS],
        [86_400 + second for second in SECONDS],
        [1000 * (86_400 + second) for second in SECONDS],
        [10**9 * (86_400 + second) for second in SECONDS],
    ],
)
def test_dates_of_every_form(values):
    role, reason = of(values)
    assert role == "date"
    assert reason.endswith("2024-06-01 to 2024-06-24")


def test_what_is_no_date():
    found = guess("day", pa.chunked_array([[f"{day}/01/2024" for day in DAYS]]))  # slashes have the month first
    assert (found.role, found.advice) == ("unused", "they are from 1950 to 2100, such as 2024-05-31")
    assert of([dt.date(2999, 1, day) for day in DAYS]) == ("unused", "dates that are not read, such as '2999-01-01'")
    assert of(list(range(1_000_000_000, 1_000_000_050)))[0] == "id"  # they count, from 2001 on if they were seconds
    assert of(SECONDS * 2, "product_id")[0] == "category"
    assert of([20240600 + day for day in (3, 31, *DAYS)])[0] == "count"  # June has 30 days


@pytest.mark.parametrize(
    ("values", "separator"),
    [
        (["a|b", "b", "a|b|c", "c|a"], "|"),
        (["a;b", "b", "a;b;c", "c;a"], ";"),
        (["a, b", "b", "a, b, c", "c, a"], ","),
        (['["a", "b"]', '["b"]', '["a"]', "[]"], None),
        (["['a', 'b']", "['b']", "['a']", "[]"], None),
        ([["a", "b"], ["b"], ["a"], []], None),
        ([[1, 2], [2], [1], []], None),
    ],
)
def test_lists_of_every_form(values, separator):
    found = guess("tags", pa.chunked_array([pa.array(values * 5)]))
    assert (found.role, found.separator) == ("list", separator)


def test_words_of_a_name_and_what_is_no_list():
    assert words_of("userId2") == words_of("user_id") == words_of("User ID") == ["user", "id"]
    towns = ["Boston, MA", "Salem, OR", "Austin, TX"] * 5  # six parts make three texts
    assert of(towns) == ("category", "3 texts, such as 'Boston, MA', 5.0 rows each")
    assert of([f"a{i}|b{i}" for i in range(20)])[0] == "id"
    assert of([[i, -i] for i in range(20)])[1] == "lists whose values do not recur"
    assert of([[[1]], [[2]]])[1] == "lists of lists or of records"
