"""What a file's name says about the model in it."""

from __future__ import annotations

import pytest

from bridge.models.names import is_model, shard_of, split_quant, stem_of, whole_models

TYPES = (
    "Q1_0 Q2_0 Q4_0 Q4_1 MXFP4_MOE Q5_0 Q5_1 IQ2_XXS IQ2_XS IQ2_S IQ2_M IQ1_S IQ1_M TQ1_0 TQ2_0 Q2_K Q2_K_S IQ3_XXS "
    "IQ3_S IQ3_M Q3_K IQ3_XS Q3_K_S Q3_K_M Q3_K_L IQ4_NL IQ4_XS Q4_K Q4_K_S Q4_K_M Q5_K Q5_K_S Q5_K_M Q6_K Q8_0 F16 "
    "BF16 F32 MXFP4 NVFP4 Q4_0_4_4 Q4_0_8_8 FP16 Q4_K_XL UD-Q4_K_XL UD-IQ2_XXS Q3_K_XL"
)


@pytest.mark.parametrize("quant", TYPES.split())
@pytest.mark.parametrize("separator", [".", "-", "_"])
def test_every_type_of_llama_quantize(quant: str, separator: str) -> None:
    assert split_quant(f"Some-Model.v2_1B{separator}{quant}") == ("Some-Model.v2_1B", quant)
    assert split_quant(f"some{separator}{quant.lower()}") == ("some", quant.lower())


@pytest.mark.parametrize(
    "stem", ["tiny", "Q4_0", "model-Q9_0", "model-7B", "model-F16x", "q4_0-model", "Qwen3-0.6B", ""]
)
def test_names_that_say_no_type(stem: str) -> None:
    assert split_quant(stem) == (stem, None)


def test_only_the_last_type_counts() -> None:
    assert split_quant("tiny-F16.Q4_0") == ("tiny-F16", "Q4_0")


def test_all_shards_of_a_model_by_one_of_them() -> None:
    shard = shard_of("m-00002-of-00003.gguf")
    assert shard is not None
    assert shard.all_names == ("m-00001-of-00003.gguf", "m-00002-of-00003.gguf", "m-00003-of-00003.gguf")


def test_shards() -> None:
    shard = shard_of("big-Q4_0-00002-of-00003.gguf")
    assert shard is not None
    assert (shard.prefix, shard.number, shard.total) == ("big-Q4_0", 2, 3)
    assert shard.name(1) == "big-Q4_0-00001-of-00003.gguf"


@pytest.mark.parametrize("numbers", ["00000-of-00002", "00003-of-00002", "00000-of-00000", "1-of-2", "000001-of-00002"])
def test_what_only_looks_like_one(numbers: str) -> None:
    assert shard_of(f"big-{numbers}.gguf") is None


def test_stems() -> None:
    assert stem_of("tiny.Q4_1.gguf") == "tiny.Q4_1"
    assert stem_of("TINY.GGUF") == "TINY"
    assert stem_of("big-00002-of-00003.gguf") == "big"
    assert stem_of("no-ending") == "no-ending"


@pytest.mark.parametrize(
    ("file", "expected"),
    [
        ("tiny.gguf", True),
        ("tiny.GGUF", True),
        ("my-mmprojector.gguf", True),
        (".tiny.gguf", False),
        ("tiny.gguf.part", False),
        ("tiny.bin", False),
        ("mmproj.gguf", False),
        ("mmproj-F16.gguf", False),
        ("MMPROJ_tiny.gguf", False),
        ("tiny-mmproj-f16.gguf", False),
    ],
)
def test_what_may_be_a_model(file: str, expected: bool) -> None:
    assert is_model(file) is expected


def test_shards_are_a_model_once_all_are_there() -> None:
    files = ["b-00002-of-00002.gguf", "a.gguf", "b-00001-of-00002.gguf", "c-00001-of-00002.gguf"]
    files += ["b-00001-of-00001.gguf", "c-00003-of-00002.gguf"]
    assert sorted(whole_models(files, str)) == [
        ("a.gguf",),
        ("b-00001-of-00001.gguf",),
        ("b-00001-of-00002.gguf", "b-00002-of-00002.gguf"),
        ("c-00003-of-00002.gguf",),
    ]
