"""The files of the standard tables, each as ``RawTables``: values as they stand in the files. One file a dataset."""

from apps.recsys.readers.adult import read_adult
from apps.recsys.readers.ali_ccp import read_ali_ccp
from apps.recsys.readers.aliexpress import read_aliexpress
from apps.recsys.readers.census import read_census_income
from apps.recsys.readers.kuairand import read_kuairand
from apps.recsys.readers.movielens import read_movielens_1m, read_movielens_100k
from apps.recsys.readers.raw import RawTables

__all__ = [
    "RawTables",
    "read_adult",
    "read_ali_ccp",
    "read_aliexpress",
    "read_census_income",
    "read_kuairand",
    "read_movielens_1m",
    "read_movielens_100k",
]
