"""What contradicts itself is refused at once, in one line that names it; and a feature is left out with its options."""

import pytest
from refusals import refused

from apps.recsys.metrics import MultiTaskMetrics
from apps.recsys.readers.synthetic import SyntheticConfig
from apps.recsys.schema import SplitConfig, TableConfig, TaskConfig, nearest
from apps.recsys.sequence.data import HistoryData
from apps.recsys.sequence.report import NextItemReportConfig
from apps.recsys.tables.columns.dense import DenseConfig
from apps.recsys.tables.columns.embedding import EmbeddingConfig
from apps.recsys.tables.data import TableData
from apps.recsys.tables.estimators import HistGradientBoosting, LogisticRegression
from apps.recsys.tables.negatives.weighting import WeightingConfig
from apps.recsys.tables.shard.strategy import TorchRecStrategy

CLICK = {"click": TaskConfig("y")}
TASKS = ("click", "buy")
REFUSED = [
    (lambda: TableConfig(tasks=CLICK), "names no feature"),
    (lambda: TableConfig(categorical=("a", "y"), tasks=CLICK),
     "column 'y' is the label of task 'click' and a categorical feature"),
    (lambda: TableConfig(continuous=("y",), tasks=CLICK),
     "column 'y' is the label of task 'click' and a continuous feature"),
    (lambda: TableConfig(categorical=("a",), continuous=("a",), tasks=CLICK),
     "'a' is listed twice: under categorical and con"),
    (lambda: TableConfig(categorical=("a.b",), tasks=CLICK), "'a.b': a feature or a task needs a name without dot"),
    (lambda: TableConfig(categorical=("user",), hash_rows={"usr": 9}, tasks=CLICK),
     "hash_rows names 'usr'.*mean 'user'"),
    (lambda: TableConfig(categorical=("a",), num_rows={"a": 9}, hash_rows={"a": 9}, tasks=CLICK),
     "both hash_rows and num_rows"),
    (lambda: TableConfig(categorical=("a",), tasks=CLICK, split=SplitConfig("user")), "needs table.user"),
    (lambda: TableConfig(categorical=("a",), tasks=CLICK, split=SplitConfig("time")), "needs table.time"),
    (lambda: TableConfig(categorical=("a",), tasks=CLICK, split=SplitConfig(stratify="clik")),
     "split.stratify='clik' is not one of click; did you mean 'click'"),
    (lambda: SplitConfig("time", stratify="click"), "is for kind 'given' or 'random', not 'time'"),
    (lambda: TaskConfig("y", positive=("a",), at_least=1), "'y': positive and at_least exclude each other"),
    (lambda: SplitConfig(kind="random", gap="90d"), "split.gap='90d' is for kind 'time', not 'random'"),
    (lambda: SplitConfig(kind="given", origins=2), "split.origins=2 is for splits by time and draws, not 'given'"),
    (lambda: SplitConfig(kind="time", gap="90 moons"), "split.gap='90 moons' is no time above 0, such as 90d"),
    (lambda: SplitConfig(kind="time", gap=0), "split.gap=0 is no time above 0"),
    (lambda: SplitConfig(kind="time", gap=-1), "split.gap=-1 is no time above 0"),
    (lambda: SplitConfig(kind="time", origins=3, origin=3), "split.origin=3 must be below split.origins=3"),
    (lambda: SplitConfig(kind="time", origins=4, test=0.25),
     "split.origins=4 windows of test=0.25 leave no row before them"),
    (lambda: SyntheticConfig(correlation=1.1), r"correlation=1.1 of 2 tasks must lie in \[-1, 1\]"),
    (lambda: SyntheticConfig(correlation=-0.6, num_tasks=3), r"correlation=-0.6 of 3 tasks must lie in \[-0.5, 1\]"),
    (lambda: SyntheticConfig(num_features=1), "num_features=1 must be at least num_tasks=2"),
    (lambda: SyntheticConfig(alphas=(1.0,)), "alphas has 1 values, betas 4"),
    (lambda: TableData(dataset="censsus_income"),
     "dataset='censsus_income' is not one of .*did you mean 'census_income'"),
    (lambda: TableData(batch_size=0), "batch_size=0 must be at least 1"),
    (lambda: TableData(eval_batch_size=0), "eval_batch_size=0 must be at least 1"),
    (lambda: TableData(subset=0), "subset=0 must be at least 1"),
    (lambda: TableData(num_workers=-1), "num_workers=-1 must not be negative"),
    (lambda: TableData(dataset="table"), "dataset='table' needs train_file"),
    (lambda: TableData(dataset="table", train_file="x.csv"), "dataset='table' needs table"),
    (lambda: TableData(train_file="x.csv"), "train_file='x.csv' is for dataset='table', not 'census_income'"),
    (lambda: TableData(synthetic=SyntheticConfig()), "synthetic is for dataset='synthetic', not 'census_income'"),
    (lambda: TableData(dataset="synthetic", root="x"), "root='x': dataset='synthetic' has no files"),
    (lambda: HistoryData(dataset="movielens_2m"),
     "dataset='movielens_2m' is not one of .*; did you mean 'movielens_1m'"),
    (lambda: HistoryData(dataset="table"), "dataset='table' needs file"),
    (lambda: HistoryData(dataset="movielens_1m", file="x.csv"),
     "file='x.csv' is for dataset='table', not 'movielens_1m'"),
    (lambda: HistoryData(dataset="table", file="x.csv", root="y"), "root='y' is for a standard dataset"),
    (lambda: HistoryData(dataset="table", file="x.csv", min_rating=4), "min_rating=4 needs rating_column"),
    (lambda: HistoryData(max_length=0), "max_length=0 must be at least 1"),
    (lambda: HistoryData(min_item_count=0), "min_item_count=0 must be at least 1"),
    (lambda: HistoryData(train_windows="al"), "train_windows='al' is not one of last, all; did you mean 'all'"),
    (lambda: EmbeddingConfig(dims={"city": 4}), "'joined' has one width"),
    (lambda: EmbeddingConfig(by_cardinality=True), "'joined' has one width"),
    (lambda: EmbeddingConfig(kind="collection", by_cardinality=True),
     "by_cardinality=True gives widths from 8 to dim=8: give a"),
    (lambda: EmbeddingConfig(kind="fused", dim=6), "embedding.dim=6 is not a multiple of 4"),
    (lambda: DenseConfig(kind="quantile", log1p=True), "log1p=True has no meaning"),
    (lambda: DenseConfig(num_bins=4), "num_bins=4 has a meaning with bins only"),
    (lambda: DenseConfig(kind="quantile", dim=4), "dense.dim=4"),
    (lambda: WeightingConfig("gradnorm", {"buy": 0.0}), r"weights\['buy'\]=0.0 is not above 0"),
    (lambda: WeightingConfig(weights={"like": 1.0}).build(TASKS), "names 'like', which is no task; there is click"),
    (lambda: WeightingConfig(weights={"click": 0.0, "buy": 0.0}).build(TASKS), "leaves no task"),
    (lambda: TorchRecStrategy(sharding="rows"), "sharding='rows' is not one of auto, table_wise, row_wise"),
    (lambda: TorchRecStrategy(table_sharding={"shop": "x"}), r"table_sharding\['shop'\]='x' is not one of"),
    (lambda: TorchRecStrategy(compute_kernel="dense"), "compute_kernel='dense' is not one of fused"),
    (lambda: TorchRecStrategy(memory_gib=0), "memory_gib=0 is not above 0"),
    (lambda: TorchRecStrategy(embedding_optimizer="lamb"), "='lamb' is not one of rowwise_adagrad, adagrad, sgd, adam"),
    (lambda: TorchRecStrategy(embedding_lr=-1), "embedding_lr=-1 must be positive"),
    (lambda: TorchRecStrategy(expert_parallel_size=0), "expert_parallel_size=0 must be at least 1"),
    (lambda: HistGradientBoosting(n_threads=0), "n_threads=0 must be at least 1"),
    (lambda: HistGradientBoosting(max_iter=0), "max_iter=0 must be at least 1"),
    (lambda: LogisticRegression(strengths=(0.0,)), r"strengths=\(0.0,\) must be positive"),
    (lambda: TaskConfig("x", kind="count", positive=(1,)), r"positive is for kind 'binary', not 'count'"),
    (lambda: TaskConfig("x", kind="ordinal", loss="absolute"), r"loss is for kind 'regression', not 'ordinal'"),
    (lambda: NextItemReportConfig(lengths=(5, 5)), r"report.lengths=\(5, 5\) must be ascending numbers of at least 1"),
    (lambda: MultiTaskMetrics(["a"], score_bins=1), "score_bins=1 must be at least 2"),
]  # fmt: skip


@pytest.mark.parametrize(("make", "message"), REFUSED, ids=[f"{i} {row[1][:40]}" for i, row in enumerate(REFUSED)])
def test_what_contradicts_itself_is_refused(make, message):
    refused(message, make)


def test_a_feature_is_left_out_with_its_options_and_a_near_name_is_suggested():
    config = TableConfig(
        categorical=("a", "b"), continuous=("c",), tasks=CLICK, hash_rows={"a": 9}, user="a", num_rows={"b": 4}
    )
    left = config.without(["a"])
    assert (left.features, left.hash_rows, left.num_rows) == (("b", "c"), {}, {"b": 4})
    assert left.user == "a"  # the role of the user is not that of a feature
    assert left.roles == {"a": "user", "y": "task click", "b": "categorical", "c": "continuous"}
    refused("exclude='d' is not a feature", lambda: config.without(["d"]))
    refused("exclude leaves no feature", lambda: config.without(["a", "b", "c"]))
    assert nearest("citty", ("City", "age")) == "; did you mean 'City'?"
    assert nearest("price", ("dice", "created")) == ""  # they share three letters of nine
