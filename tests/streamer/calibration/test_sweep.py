"""Every text architecture of the installed transformers that builds at small size, against itself run whole."""

import pytest
import sweep
import transformers


@pytest.mark.parametrize(
    "kind", ["llama", "gemma3n_text", "gemma4_text", "qwen3_5_text", "bamba", "xlstm", "openai-gpt"]
)
def test_architectures_that_ask_something_of_their_own(kind):
    """Several hidden states, shared keys and values, linear attention, layers that return tuples of two, or lists."""
    assert sweep.verdict(kind) == "yes"


@pytest.mark.slow
def test_the_documents_table_says_what_architectures_do():
    if f"transformers {transformers.__version__}," not in sweep.documented():
        pytest.skip("the table is of another release of transformers")
    table = sweep.table()
    assert "fails" not in table
    assert table == sweep.documented(), "run tests/streamer/calibration/sweep.py"
