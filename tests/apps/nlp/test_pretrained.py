"""Training that begins with a published checkpoint: its network, weights and subwords, and the way back."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import published_shapes
import pytest
import torch
from copying import WORDS, write_copies
from predicted import printed
from sentencepiece import SentencePieceProcessor, SentencePieceTrainer
from torch.testing import assert_close

import core
from apps.cli import main
from apps.data.subwords import SubwordConfig
from apps.nets.config import TransformerConfig
from apps.nets.transformer import LanguageModel, TranslationModel
from apps.nlp.decode import DecodeConfig
from apps.nlp.language.data import TextData
from apps.nlp.language.module import LanguageModeler
from apps.nlp.translation.data import TranslationData
from apps.nlp.translation.module import Translator
from apps.porting import config_of, load_pretrained, save_pretrained, subwords_of

SIZES = {"dim": 32, "hidden_dim": 48, "num_heads": 2, "decoder_layers": 2}
T5 = replace(published_shapes.T5, **SIZES, encoder_layers=2, tie="all", logits_scale=32**-0.5)
MISTRAL = replace(published_shapes.MIXTRAL, **SIZES)
EXPERTS = core.MoEConfig(4, core.TokenChoice(top_k=1), core.FFN(48, "relu"))
SPARE = 5  # ids of the checkpoint past its pieces, as T5's sentinels
T5_IDS = {"pad_id": 0, "eos_id": 1, "unk_id": 2, "bos_id": -1}


def sentencepiece_file(path: Path, **options: Any) -> int:
    """A sentencepiece model of the copied words; how many pieces it has."""
    with path.open("wb") as file:
        given = {"vocab_size": 30, "hard_vocab_limit": False, "minloglevel": 2, "normalization_rule_name": "identity"}
        lines = iter([" ".join(WORDS), *WORDS] * 4)
        SentencePieceTrainer.train(sentence_iterator=lines, model_writer=file, **{**given, **options})
    return SentencePieceProcessor(model_file=str(path)).vocab_size()


def published(folder: Path, moe: core.MoEConfig | None = EXPERTS, config: TransformerConfig = T5) -> Path:
    """A checkpoint of T5's or Switch's layout; ids: three specials of theirs, and our begin."""
    folder.mkdir()
    size = sentencepiece_file(folder / "spiece.model", **T5_IDS)
    torch.manual_seed(1)
    save_pretrained(TranslationModel(config, source_vocab=size + SPARE + 1, ffn=moe), folder)
    return folder


def published_text(folder: Path) -> Path:
    """A checkpoint of Mistral's layout; ids: three specials of theirs, and our padding."""
    folder.mkdir()
    size = sentencepiece_file(folder / "tokenizer.model", unk_id=0, bos_id=1, eos_id=2, model_type="bpe")
    torch.manual_seed(1)
    save_pretrained(LanguageModel(MISTRAL, vocab=size + 1), folder)
    return folder


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Path:
    return write_copies(tmp_path_factory.mktemp("corpus"), ("de", "fr"))


def make_data(corpus: Path, path: Path | None, *targets: str, **options: Any) -> TranslationData:
    pairs = [f"en-{target}" for target in targets or ("de",)]
    files = {"train_files": "train", "val_files": "val", "test_files": "test"}
    given = {"root": str(corpus), "cache_dir": str(corpus / "cache"), "pairs": pairs, **files, **options}
    return TranslationData("moses", tokenizer=SubwordConfig(vocab_size=300, path=path and str(path)), **given)


def make(data: TranslationData, folder: Path, **options: Any) -> Translator:
    return Translator(data.subwords, data.pairs, pretrained=str(folder), report=None, **options)


def weights_equal(a: torch.nn.Module, b: torch.nn.Module) -> None:
    assert_close(dict(a.state_dict()), dict(b.state_dict()), rtol=0, atol=0)


def message(call: Any, folder: Path) -> str:
    with pytest.raises(ValueError) as error:
        call()
    assert "\n" not in str(error.value)
    return str(error.value).replace(str(folder), "F")


@pytest.mark.parametrize("moe", [None, EXPERTS], ids=["t5", "switch"])
def test_a_translator_begins_with_the_published_network_and_weights(moe, corpus, tmp_path):
    folder = published(tmp_path / "p", moe)
    data = make_data(corpus, folder, text=["red blue", "green"])
    greedy = DecodeConfig("greedy", max_length_ratio=1.0, max_length_extra=2)
    module, other = (make(data, folder, decode=greedy).eval() for _ in range(2))
    other.load_state_dict(module.state_dict())  # of its own
    assert printed(module, data) != printed(other, data)  # which needs no trainer
    weights_equal(module.model, load_pretrained(folder))
    assert module.hparams["transformer"]["positions"] == "relative"
    # From what a checkpoint keeps, the same is built without the folder.
    shutil.rmtree(folder)
    again = module.twin()
    again.load_state_dict(module.state_dict())
    again.setup("test")
    weights_equal(again, module)


CONFIG = """
model: {class_path: Translator, init_args: {pretrained: published, report: null, optimizer: {lr: 1.0e-2}}}
data:
  class_path: TranslationData
  init_args: {dataset: moses, root: corpus, cache_dir: cache, pairs: [en-de], train_files: train, val_files: val,
              test_files: test, tokenizer: {path: published}}
trainer: {accelerator: cpu, enable_progress_bar: false, logger: false, limit_val_batches: 1, limit_train_batches: 2}
"""


def test_the_command_line_tunes_a_checkpoint_and_needs_it_no_more(corpus, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("corpus").symlink_to(corpus)
    folder = published(Path("published"))
    first, last = load_pretrained(folder), Path("runs/c/checkpoints/last.ckpt")
    Path("c.yaml").write_text(CONFIG)
    argv = ["--config", "c.yaml", "--model.decode.method=greedy", "--trainer.max_epochs"]
    assert main(["fit", *argv, "1"]) == 0
    assert "the weights are those of published" in capsys.readouterr().err
    tuned = Translator.load_from_checkpoint(last).model.state_dict()
    moved = [name for name, weight in first.state_dict().items() if not torch.equal(weight, tuned[name])]
    assert "source_embed.weight" in moved
    shutil.rmtree(folder)
    assert main(["fit", *argv, "2", "--ckpt_path", "last"]) == 0
    assert torch.load(last, weights_only=True)["epoch"] == 1
    assert "the weights are those of published" not in capsys.readouterr().err


def test_a_given_network_must_be_the_published_one(corpus, tmp_path):
    folder = published(tmp_path / "p")
    data = make_data(corpus, folder)

    def refusal(**options: Any) -> str:
        return message(lambda: make(data, folder, **options).setup("fit"), folder)

    assert refusal(transformer=replace(T5, norm="layer"), moe=EXPERTS) == "norm='layer' of the model is, in F, 'rms'"
    assert refusal(transformer=T5) == "encoder_moe_blocks=() of the model is, in F, (1,)"
    assert refusal(decoder_moe_blocks=[0]) == "decoder_moe_blocks=(0,) of the model is, in F, (1,)"
    assert refusal(moe=replace(EXPERTS, num_experts=8)) == "moe.num_experts=8 of the model is, in F, 4"
    assert refusal(dense_ffn=core.DenseFFN(8)).endswith(" is no FFN of pretrained='F'")
    # Dropout, capacity and losses are a training's own.
    module = make(data, folder, transformer=replace(T5, dropout=0.3), moe=replace(EXPERTS, capacity_factor=1.5))
    module.setup("fit")
    weights_equal(module.model, load_pretrained(folder))
    moe = replace(EXPERTS, capacity_factor=1.5)
    assert make(data, folder, moe=moe).moe == moe


def test_what_cannot_begin_a_training_or_be_compared_is_told_in_a_line(corpus, tmp_path):
    folder, text = published(tmp_path / "p"), published_text(tmp_path / "t")
    learned = make_data(corpus, None)
    told = message(lambda: make(learned, folder).setup("fit"), folder)
    assert told.startswith("the data's subwords are not those of pretrained=F, whose words the model would not know: ")
    assert told.endswith(": --data.tokenizer.path F takes them")
    told = message(lambda: make(learned, text), text)
    assert told == "pretrained='F' holds a mistral, which LanguageModeler trains, and not Translator"
    gone = tmp_path / "gone"
    told = message(lambda: make(learned, gone), gone)
    assert told == "pretrained='F' is no folder here, and nothing is fetched from elsewhere"
    # Of M2M-100 and NLLB weights are read, and no subwords.
    config = {"model_type": "m2m_100", "vocab_size": 30}
    gone.mkdir()
    (gone / "config.json").write_text(json.dumps(config))
    (gone / "sentencepiece.bpe.model").write_bytes((folder / "spiece.model").read_bytes())
    told = message(lambda: make_data(corpus, gone), gone)
    assert told == "F has no subwords that are known here: neither spiece.model nor tokenizer.model"
    with pytest.raises(ValueError, match="holds a switch_transformers, which Translator trains, and not LanguageMod"):
        LanguageModeler(learned.subwords, pretrained=str(folder))
    # Published weights are compared with no other network.
    module = make(make_data(corpus, folder), folder)
    baselines = module.comparison.baselines()
    assert list(baselines) == ["dense_equal_flops", "dense_equal_params"]
    for baseline in baselines.values():
        assert baseline.build is None
        assert baseline.note == f"the weights of pretrained={folder} are of the sparse model alone"
    told = message(lambda: module.comparison.with_moe(EXPERTS), folder)
    assert told == "pretrained='F' has the weights of its own experts alone: no others are compared"


def test_tags_take_ids_that_the_checkpoint_does_not_use(corpus, tmp_path):
    folder = published(tmp_path / "p")
    plain = subwords_of(folder)
    data = make_data(corpus, folder, "de", "fr")
    subwords, size = data.subwords, plain.size("source")
    assert subwords.languages == ("de", "fr")
    assert [subwords.tag_id(language) for language in ("de", "fr")] == [size - 1, size - 2]
    assert subwords.size("source") == size
    assert subwords.encode(["red <2de> blue"], "source") == plain.encode(["red <2de> blue"], "source")
    batch = next(iter(data.test_dataloader()))
    assert batch.source_BS[:, 0].tolist() == [size - 1 - pair for pair in batch.pair_B.tolist()]
    module = make(data, folder)
    module.setup("fit")
    weights_equal(module.model, load_pretrained(folder))
    # Of one target there is none, and of more than there are ids none can be.
    assert make_data(corpus, folder).subwords == plain
    targets = [f"x{i}" for i in range(SPARE + 1)]
    assert message(lambda: subwords_of(folder, targets), folder / "spiece.model") == (
        f"F has no tag for {', '.join(targets)}, and {SPARE} ids that are not used: take pairs of one target language"
    )


@pytest.mark.parametrize("targets", [("de",), ("de", "fr")], ids=["one", "two"])
def test_the_way_back_writes_the_subwords_and_reads_them_again(targets, corpus, tmp_path):
    folder = published(tmp_path / "p")
    module = make(make_data(corpus, folder, *targets), folder)
    module.setup("fit")
    save_pretrained(module.model, tmp_path / "tuned", like=folder, subwords=module.subwords)
    written = {p.name for p in (tmp_path / "tuned").iterdir()}
    assert written == {"config.json", "model.safetensors", "spiece.model"}
    weights_equal(load_pretrained(tmp_path / "tuned"), module.model)
    again = subwords_of(tmp_path / "tuned", targets)
    assert sorted(again.languages) == sorted(module.subwords.languages)
    assert again.models == module.subwords.models
    # Its ids are those of the file that was published.
    theirs, own = (SentencePieceProcessor(model_file=str(f / "spiece.model")) for f in (folder, tmp_path / "tuned"))
    assert own.encode(["red blue zoo"]) == theirs.encode(["red blue zoo"])
    assert [own.pad_id(), own.eos_id(), own.unk_id(), own.bos_id()] == [0, 1, 2, -1]
    assert own.vocab_size() == theirs.vocab_size() + (SPARE if len(targets) > 1 else 0)
    # A further language finds the tags of the others where they are.
    if len(targets) > 1:
        more = subwords_of(tmp_path / "tuned", ("de", "es"))
        assert [more.tag_id(x) for x in ("de", "fr")] == [module.subwords.tag_id(x) for x in ("de", "fr")]
        assert more.tag_id("es") == again.size("source") - 3


def test_subwords_that_a_published_architecture_has_not(corpus, tmp_path):
    subwords = make_data(corpus, None).subwords
    size = subwords.size("source")
    m2m = TranslationModel(TransformerConfig("nano", position_offset=2), source_vocab=size)
    told = message(lambda: save_pretrained(m2m, tmp_path / "m", subwords=subwords), tmp_path)
    assert told == "subwords cannot be said in m2m_100, whose tokenizer is no sentencepiece model alone"
    t5 = TranslationModel(T5, source_vocab=size + 1)
    told = message(lambda: save_pretrained(t5, tmp_path / "t", subwords=subwords), tmp_path)
    assert told == f"joint subwords of {size} ids are not those of a model with a joint vocabulary of {size + 1}"
    assert list(tmp_path.iterdir()) == []
    # What was trained here goes out, and comes in again.
    save_pretrained(TranslationModel(T5, source_vocab=size), tmp_path / "t", subwords=subwords)
    lines = ["red blue", "green"]
    assert subwords_of(tmp_path / "t").encode(lines, "source") == subwords.encode(lines, "source")


def test_a_tokenizer_file_of_ones_own(corpus, tmp_path):
    path = tmp_path / "own.model"
    size = sentencepiece_file(path, model_type="bpe")  # unknown 0, begin 1, end 2, no padding
    theirs = SentencePieceProcessor(model_file=str(path))
    subwords = make_data(corpus, path).subwords
    assert subwords.pieces([0, 1, 2, 3], "source") == ["<pad>", "<unk>", "<s>", "</s>"]
    assert subwords.size("source") == size + 1
    (own,), (ids,) = (subwords.encode(["red blue"], "source"), theirs.encode(["red blue"]))
    assert own == [i + 1 for i in ids]  # padding comes before them, and their three specials stay before the others
    two = make_data(corpus, path, "de", "fr").subwords
    assert [two.tag_id(language) for language in ("de", "fr")] == [size + 1, size + 2]
    # One with tags of its own.
    sentencepiece_file(path, model_type="bpe", user_defined_symbols=["<2de>", "<2it>"])
    tagged = make_data(corpus, path).subwords
    assert tagged.languages == ("de", "it")
    assert tagged.tag_id("de") == 4
    assert 4 not in tagged.encode(["red <2de> blue"], "source")[0]
    path.write_bytes(b"nothing")
    assert message(lambda: make_data(corpus, path), path) == "F is no sentencepiece model"


def test_a_language_model_begins_with_a_published_one(corpus, tmp_path):
    folder = published_text(tmp_path / "p")
    given = {"train_files": "train.en", "root": str(corpus), "cache_dir": str(tmp_path)}
    data = TextData(**given, tokenizer=SubwordConfig(path=str(folder)))
    module = LanguageModeler(data.subwords, pretrained=str(folder))
    assert module.transformer == config_of(folder).transformer
    module.setup("fit")
    weights_equal(module.model, load_pretrained(folder))
    save_pretrained(module.model, tmp_path / "tuned", like=folder, subwords=data.subwords)
    assert subwords_of(tmp_path / "tuned") == data.subwords
