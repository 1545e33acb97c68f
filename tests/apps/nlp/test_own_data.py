"""Two text files of a user's become a configuration."""

import pytest

from apps.data.given import GivenData
from apps.data.subwords import SubwordConfig
from apps.nlp.own_data import config_for
from apps.nlp.translation.data import TranslationData


def write(path, count, word):
    path.write_text("".join(f"{word} {i} and {word} {i % 7}\n" for i in range(count)))
    return path


def test_two_files_are_a_pair_of_languages_and_files_that_do_not_fit_are_refused(tmp_path):
    paths = (write(tmp_path / "a.en", 240, "red"), write(tmp_path / "a.de", 240, "rot"))
    made = config_for(GivenData(paths, None, tmp_path / "made"))
    assert made.notes == ("240 pairs of lines, en to de; a tenth is held out for the test.",)
    arguments = made.config["data"]["init_args"]
    tokenizer = SubwordConfig(**arguments["tokenizer"])
    data = TranslationData(**{**arguments, "tokenizer": tokenizer}, cache_dir=str(tmp_path / "cache"))
    assert data.pairs == ("en-de",)
    # A tenth of 240 tests, a twentieth validates.
    assert data.sizes() == {"train": 204, "val": 12, "test": 24}
    # Names without a language are source and target.
    paths = (write(tmp_path / "left.txt", 240, "red"), write(tmp_path / "right.txt", 240, "rot"))
    made = config_for(GivenData(paths, None, tmp_path / "made"))
    assert made.config["data"]["init_args"]["pairs"] == ["source-target"]
    long, short = write(tmp_path / "a.en", 240, "red"), write(tmp_path / "a.de", 239, "rot")
    assert config_for(GivenData((long,), None, tmp_path / "made")) is None
    with pytest.raises(ValueError, match="have 240 and 239 lines: line i of one must translate line i of the other"):
        config_for(GivenData((long, short), None, tmp_path / "made"))
    few = write(tmp_path / "b.en", 9, "red"), write(tmp_path / "b.de", 9, "rot")
    with pytest.raises(ValueError, match="have 9 lines: 200 are needed at least"):
        config_for(GivenData(few, None, tmp_path / "made"))
