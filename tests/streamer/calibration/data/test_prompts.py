"""Calibration data: what is read, how it is rendered and selected, and what is refused, by line."""

import json
import shutil
from pathlib import Path

import pytest
from blake3 import blake3
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from safeshard.manifests.errors import RequestError
from safeshard.streamer.calibration.data import data_files
from safeshard.streamer.calibration.data.data_files import BUILT_IN
from safeshard.streamer.calibration.data.prompts import load_prompts

CONFIG = Path(__file__).parents[3] / "goldens/llama/aligned/config.json"  # a vocabulary of 256
CHAT = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
WORDS = [
    "<unk>",
    "<s>",
    "<",
    ">",
    "user",
    "assistant",
    "system",
    "[",
    "]",
    "[/",
    "INST",
    "hi",
    "there",
    "no",
    "sorry",
    "ask",
]


def make_tokenizer(folder, chat_template=None, words=WORDS):
    """A word tokenizer that starts every text with <s>, beside a config.json."""
    vocabulary = {word: index for index, word in enumerate(words)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>")
    fast.chat_template = chat_template
    fast.save_pretrained(folder)
    shutil.copy(CONFIG, folder)
    return folder


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    return make_tokenizer(tmp_path_factory.mktemp("plain"))


@pytest.fixture(scope="module")
def chatty(tmp_path_factory):
    return make_tokenizer(tmp_path_factory.mktemp("chat"), CHAT)


@pytest.fixture(scope="module")
def bare(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bare")
    shutil.copy(CONFIG, folder)
    return folder


def write(folder, content):
    path = folder / "data.jsonl"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def lines(*records):
    return "".join(json.dumps(record) + "\n" for record in records)


def words(ids):
    return [WORDS[token] for token in ids]


PAIR = {"instruction": "hi there", "output": "sorry no"}
TALK = {"messages": [{"role": "user", "content": "hi there"}, {"role": "assistant", "content": "sorry no"}]}


@pytest.mark.parametrize("record", [PAIR, TALK])
def test_the_models_chat_template_renders(chatty, tmp_path, record):
    (sample,) = load_prompts(write(tmp_path, lines(record)), chatty, samples=1).tokens
    assert words(sample) == ["<", "user", ">", "hi", "there", "<", "assistant", ">", "sorry", "no"]


@pytest.mark.parametrize("record", [PAIR, TALK])
def test_without_a_template_the_published_format(plain, tmp_path, record):
    (sample,) = load_prompts(write(tmp_path, lines(record)), plain, samples=1).tokens
    tokenizer = AutoTokenizer.from_pretrained(plain)
    # The published code joins the prompt's tokens and the answer's without their first, the start of a text.
    assert sample == tokenizer("[INST] hi there [/INST]").input_ids + tokenizer("sorry no").input_ids[1:]
    assert words(sample) == ["<s>", "[", "INST", "]", "hi", "there", "[/", "INST", "]", "sorry", "no"]


def test_token_ids_need_no_tokenizer_and_stay_as_they_are(bare, tmp_path):
    path = write(tmp_path, lines({"input_ids": [3, 255, 0]}, {"input_ids": list(range(20))}))
    prompts = load_prompts(path, bare, samples=2, max_tokens=7)
    assert prompts.tokens == [[3, 255, 0], list(range(7))]
    assert (prompts.source, prompts.count) == (str(path), 2)
    assert prompts.blake3 == blake3(path.read_bytes()).hexdigest()


def test_a_json_list_is_as_good_as_lines(bare, tmp_path):
    records = [{"input_ids": [index]} for index in range(4)]
    for text in (json.dumps(records), json.dumps(records, indent=2), "\n " + json.dumps(records) + "\n"):
        assert load_prompts(write(tmp_path, text), bare, samples=4).tokens == [[0], [1], [2], [3]]


def test_a_byte_order_mark_blank_lines_and_windows_line_ends(bare, tmp_path):
    text = b'\xef\xbb\xbf\r\n{"input_ids": [1]}\r\n\r\n{"input_ids": [2]}'
    assert load_prompts(write(tmp_path, text), bare, samples=2).tokens == [[1], [2]]


@settings(deadline=None, max_examples=30)
@given(count=st.integers(1, 40), share=st.floats(0, 1), seed=st.integers(0, 2**31))
def test_the_selection_is_seeded_and_in_file_order(bare, tmp_path_factory, count, share, seed):
    path = write(tmp_path_factory.mktemp("s"), lines(*({"input_ids": [index]} for index in range(count))))
    samples = max(1, int(share * count))
    chosen = [ids[0] for ids in load_prompts(path, bare, samples=samples, seed=seed).tokens]
    assert chosen == sorted(set(chosen))
    assert len(chosen) == samples
    assert chosen == [ids[0] for ids in load_prompts(path, bare, samples=samples, seed=seed).tokens]


def test_seeds_select_differently_and_stay_the_same_between_releases(bare, tmp_path):
    path = write(tmp_path, lines(*({"input_ids": [index]} for index in range(50))))
    chosen = [[ids[0] for ids in load_prompts(path, bare, samples=4, seed=seed).tokens] for seed in (0, 1)]
    assert chosen == [[25, 35, 40, 46], [9, 13, 20, 35]]


def test_the_built_in_data_serves_the_defaults(plain):
    prompts = load_prompts(None, plain)
    assert len(prompts.tokens) == 128 <= prompts.count
    assert prompts.source == "built-in refusals"
    records = [json.loads(line) for line in BUILT_IN.read_text().splitlines()]
    assert all(set(record) == {"instruction", "output"} for record in records)
    assert len({record["instruction"] for record in records}) == len({record["output"] for record in records}) == 130


GOOD = {"input_ids": [1]}


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        ([1], "got list"),
        ({}, "got none of them"),
        ({"instruction": "a", "messages": []}, "got messages and instruction"),
        ({"conversations": [], "messages": []}, "got messages and conversations"),
        ({"instruction": "a"}, "`output`"),
        ({"instruction": "a", "output": "  "}, "`output`.*blank"),
        ({"instruction": 3, "output": "b"}, "`instruction`"),
        ({"instruction": "a", "input": 3, "output": "b"}, "`input`"),
        ({"prompt": "a"}, "`prompt` alone"),
        ({"conversations": [{"from": "tool", "value": "x"}]}, "`tool`"),
        ({"conversations": []}, "`conversations`"),
        ({"messages": [{"role": "user", "content": [{"type": "image"}]}]}, "type `image`"),
        ({"messages": [{"role": "user", "content": None}]}, "`content`"),
        ({"messages": []}, "`messages`"),
        ({"messages": [{"role": "user"}]}, "`content`"),
        ({"messages": "hi"}, "`messages`"),
        ({"input_ids": []}, "`input_ids`"),
        ({"input_ids": [1, -1]}, "`input_ids`"),
        ({"input_ids": [True]}, "`input_ids`"),
        ({"input_ids": [1.0]}, "`input_ids`"),
        ({"input_ids": [256]}, "below 256, got 256"),
        ({"messages": [{"role": "system", "content": "hi"}]}, "`system` at turn 1"),
    ],
)
def test_bad_records_are_refused_with_their_lines(plain, tmp_path, record, reason):
    path = write(tmp_path, lines(GOOD, record, GOOD) + "\n" + lines(record))
    with pytest.raises(RequestError, match=reason) as caught:
        load_prompts(path, plain, samples=4)
    assert [offence.where for offence in caught.value.offences] == [f"{path}:2", f"{path}:5"]
    path = write(tmp_path, json.dumps([GOOD, record, GOOD, record], indent=None).replace("}, ", "},\n\n"))
    with pytest.raises(RequestError, match=reason):
        load_prompts(path, plain, samples=4)


def test_many_records_that_are_wrong_alike_are_one_offence(plain, tmp_path):
    path = write(tmp_path, lines(GOOD, *[{"prompt": "hi"}] * 30, {"input_ids": []}))
    with pytest.raises(RequestError) as caught:
        load_prompts(path, plain, samples=4)
    many, one = caught.value.offences
    assert (many.where, many.what, many.got) == (str(path), "30 of 32 records (lines 2, 3, 4, ...)", "`prompt` alone")
    assert one.where == f"{path}:32"
    assert "`instruction` with `output`" in many.remedy
    program = write(tmp_path, "import json\n\n" * 50)
    with pytest.raises(
        RequestError, match=r"50 of 50 records \(lines 1, 3, 5, ...\): expected a JSON object.*`messages`"
    ):
        load_prompts(program, plain, samples=4)
    path = write(tmp_path, lines(*[{"input_ids": [256]}] * 9))
    with pytest.raises(RequestError, match=r"8 of 8 records .*expected token ids below 256, got 256$"):
        load_prompts(path, plain, samples=8)


def test_the_lines_of_a_json_list(plain, tmp_path):
    path = write(tmp_path, '[{"input_ids": [1]},\n {"input_ids": [2]}, {"input_ids": []},\n\n  3\n]')
    with pytest.raises(RequestError) as caught:
        load_prompts(path, plain, samples=1)
    assert [offence.where for offence in caught.value.offences] == [f"{path}:2", f"{path}:4"]


@pytest.mark.parametrize(
    ("content", "line"),
    [
        (lines(GOOD) + '{"input_ids": [1]\n', 2),
        ("[\n" + json.dumps(GOOD) + "\n" + json.dumps(GOOD) + "]", 3),
        (lines(GOOD).encode() + b'{"instruction": "\xff"}', 2),
        ("[" * 100_000, 1),
        (lines(GOOD) + '{"a":' * 100_000, 2),
    ],
    ids=["line", "list", "utf-8", "deep list", "deep line"],
)
def test_text_that_is_no_json_is_refused_with_its_line(plain, tmp_path, content, line):
    path = write(tmp_path, content)
    with pytest.raises(RequestError) as caught:
        load_prompts(path, plain, samples=1)
    assert [offence.where for offence in caught.value.offences] == [f"{path}:{line}"]


@pytest.mark.parametrize(("content", "line"), [("", 1), ("\n\n", 1), ("[]", 1), (lines(GOOD, GOOD), 2)])
def test_too_little_data_is_refused(bare, tmp_path, content, line):
    path = write(tmp_path, content)
    with pytest.raises(RequestError, match="expected 3 samples") as caught:
        load_prompts(path, bare, samples=3)
    assert caught.value.offences[0].where == f"{path}:{line}"


def test_a_missing_file_and_a_folder_are_refused(bare, tmp_path):
    for path in (tmp_path / "none.jsonl", tmp_path):
        with pytest.raises(RequestError, match="readable file"):
            load_prompts(path, bare)
    with pytest.raises(RequestError, match=r"No such file.*\(name a file of JSON lines, .*URL\)$"):
        load_prompts(tmp_path / "none.jsonl", bare)
    near = write(tmp_path, lines(GOOD))
    with pytest.raises(RequestError, match=rf"No such file.*; its folder has {near.name}\)"):
        load_prompts(tmp_path / "none.jsonl", bare)


@pytest.mark.parametrize("option", ["samples", "max_tokens"])
def test_counts_below_one_are_refused(bare, option):
    with pytest.raises(RequestError, match="--" + option.replace("_", "-")):
        load_prompts(None, bare, **{option: 0})


def test_a_missing_or_broken_tokenizer_is_refused_with_a_remedy(bare, tmp_path):
    with pytest.raises(RequestError, match=r"tokenizer.*got none.*`input_ids`"):
        load_prompts(None, bare)
    broken = make_tokenizer(tmp_path)
    (broken / "tokenizer.json").write_text("{}")
    with pytest.raises(RequestError, match=r"tokenizer.*`input_ids`"):
        load_prompts(None, broken)


def test_a_tokenizer_larger_than_the_vocabulary_is_refused(tmp_path):
    folder = make_tokenizer(tmp_path, words=WORDS + [f"w{index}" for index in range(300)])
    path = write(tmp_path, lines(PAIR, {"instruction": "hi", "output": "w299"}))
    with pytest.raises(RequestError, match="below 256, got 315") as caught:
        load_prompts(path, folder, samples=2)
    assert caught.value.offences[0].where == f"{path}:2"


def test_a_chat_template_that_fails_names_the_line(tmp_path):
    refusing = "{% if messages[0].role == 'system' %}{{ raise_exception('no such role') }}{% endif %}"
    path = write(tmp_path, lines(PAIR, {"messages": [{"role": "system", "content": "x"}]}))
    with pytest.raises(RequestError, match="no such role") as caught:
        load_prompts(path, make_tokenizer(tmp_path, refusing + CHAT), samples=2)
    assert [offence.where for offence in caught.value.offences] == [f"{path}:2"]


def test_text_that_renders_to_no_token_is_refused(tmp_path):
    path = write(tmp_path, lines(PAIR))
    with pytest.raises(RequestError, match="drops the text of turn 1"):
        load_prompts(path, make_tokenizer(tmp_path, "{{ '' }}"), samples=1)


@pytest.mark.parametrize(
    "template",
    [
        "{{ ''.__class__ }}",
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ messages.__class__.__base__.__subclasses__() }}",
        "{{ cycler.__init__.__globals__.os.system('touch escaped') }}",
        "{{ namespace.__init__.__globals__['__builtins__'].open('escaped', 'w') }}",
        "{{ self._TemplateReference__context.environment }}",
        "{{ '{0.__class__}'.format(messages) }}",
        "{{ messages.append(1) }}",
        "{{ messages|attr('__class__') }}",
        "{{ raise_exception.__globals__ }}",
        "{% include '/etc/passwd' %}",
        "{% for i in range(10 ** 9) %}x{% endfor %}",
        "{{ strftime_now.__globals__ }}",
        "{{ undefined.x }}",
        "{% for",
    ],
)
def test_a_chat_template_stays_in_its_sandbox(tmp_path, monkeypatch, template):
    folder = make_tokenizer(tmp_path / "model", template)
    data = tmp_path / "data.jsonl"
    data.write_text('{"instruction": "hi", "output": "there"}\n')
    monkeypatch.chdir(tmp_path)
    with pytest.raises(RequestError, match=r"messages that the chat template takes|got no token"):
        load_prompts(data, folder, samples=1)  # what is out of reach is an error, or reads as nothing
    assert not (tmp_path / "escaped").exists()


def test_data_beyond_the_limit(tmp_path, plain, monkeypatch):
    monkeypatch.setattr(data_files, "MAX_DATA_BYTES", 20)
    data = tmp_path / "data.jsonl"
    data.write_text('{"input_ids": [1, 2]}')
    with pytest.raises(RequestError, match="at most 20 bytes, got 21 bytes"):
        load_prompts(data, plain, samples=1)


LLAVA = (
    "{% for m in messages %}{{ m['role'] }} {% for c in m['content'] | selectattr('type', 'equalto', 'text') %}"
    "{{ c['text'] }} {% endfor %}{% endfor %}"
)
SMOLVLM = (
    "{% for m in messages %}{{ m['role'] }} {% for c in m['content'] %}{% if c['type'] == 'text' %}"
    "{{ c['text'] }} {% endif %}{% endfor %}{% endfor %}"
)
GEMMA = (
    "{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "{% for m in messages %}{{ m['role'] }} {{ m['content'] | trim }} {% endfor %}"
)
ANSWER_ALONE = "{% for m in messages %}{% if m['role'] == 'assistant' %}{{ m['content'] }}{% endif %}{% endfor %}"


@pytest.mark.parametrize("template", [LLAVA, SMOLVLM])
def test_a_template_that_goes_through_parts_is_given_parts(tmp_path, template):
    """Of a plain text it would leave nothing, without an error."""
    folder = make_tokenizer(tmp_path, template)
    (sample,) = load_prompts(write(tmp_path, lines(PAIR)), folder, samples=1).tokens
    assert words(sample) == ["user", "hi", "there", "assistant", "sorry", "no"]


def test_a_template_that_drops_a_turn_is_refused(tmp_path):
    path = write(tmp_path, lines(TALK))
    with pytest.raises(RequestError, match="drops the text of turn 1") as caught:
        load_prompts(path, make_tokenizer(tmp_path, ANSWER_ALONE), samples=1)
    assert caught.value.offences[0].where == f"{path}:1"


def test_reasoning_that_a_template_leaves_out_is_no_loss(tmp_path):
    template = "{% for m in messages %}{{ m['role'] }} {{ m['content'].split('</think>')[-1] }} {% endfor %}"
    talk = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "<think>ask</think>sorry"}]
    path = write(tmp_path, lines({"messages": talk}))
    (sample,) = load_prompts(path, make_tokenizer(tmp_path, template), samples=1).tokens
    assert words(sample) == ["user", "hi", "assistant", "sorry"]


@pytest.mark.parametrize("template", [GEMMA, None])
def test_a_system_turn_that_is_not_taken_goes_to_the_user(tmp_path, template):
    system = {"role": "system", "content": "ask"}
    path = write(tmp_path, lines({"messages": [system, *TALK["messages"]]}, PAIR))
    prompts = load_prompts(path, make_tokenizer(tmp_path, template), samples=2)
    assert [word for word in words(prompts.tokens[0]) if word in ("ask", "hi", "there")] == ["ask", "hi", "there"]
    assert prompts.notes == ("the text of the system turn at the head of the user's, in 1 calibration samples",)


FORMS = {
    "sharegpt": {"conversations": [{"from": "human", "value": "hi there"}, {"from": "gpt", "value": "sorry no"}]},
    "sharegpt with roles": {"conversations": TALK["messages"]},
    "alpaca": {"instruction": "hi", "input": "there", "output": "sorry no"},
    "alpaca without input": {"instruction": "hi there", "input": "", "output": "sorry no"},
    "completion": {"prompt": "hi there", "completion": "sorry no"},
    "response": {"prompt": "hi there", "response": "sorry no"},
    "preference": {"prompt": "hi there", "chosen": "sorry no", "rejected": "ask"},
    "conversational": {"prompt": TALK["messages"][:1], "completion": TALK["messages"][1:]},
    "conversational preference": {"prompt": "hi there", "chosen": TALK["messages"], "rejected": TALK["messages"]},
    "ultrachat": {"prompt": "hi there", "prompt_id": "3", **TALK},
    "parts": {
        "messages": [
            {"role": "user", "content": [{"type": "text", "text": "hi"}, {"type": "text", "text": "there"}]},
            {"role": "assistant", "content": [{"type": "text", "text": "sorry no"}]},
        ]
    },
    "nulls": {"instruction": "hi there", "output": "sorry no", "messages": None, "input": None},
}


@pytest.mark.parametrize("form", FORMS)
def test_all_forms_say_the_same(chatty, tmp_path, form):
    (sample,) = load_prompts(write(tmp_path, lines(FORMS[form])), chatty, samples=1).tokens
    assert words(sample) == ["<", "user", ">", "hi", "there", "<", "assistant", ">", "sorry", "no"]


def test_an_alpaca_system_comes_first(chatty, tmp_path):
    (sample,) = load_prompts(write(tmp_path, lines(PAIR | {"system": "ask"})), chatty, samples=1).tokens
    assert words(sample)[:4] == ["<", "system", ">", "ask"]


def test_tables_are_read_by_rows(chatty, tmp_path):
    path = tmp_path / "data.csv"
    path.write_text('prompt,response\nhi there,sorry no\n"hi,",no\n')
    first, second = load_prompts(path, chatty, samples=2).tokens
    assert words(first)[3:5] == ["hi", "there"]
    assert words(second)[-1] == "no"
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    parquet.write_table(pyarrow.Table.from_pylist([FORMS["sharegpt"], FORMS["sharegpt"]]), tmp_path / "data.parquet")
    for sample in load_prompts(tmp_path / "data.parquet", chatty, samples=2).tokens:
        assert words(sample)[-2:] == ["sorry", "no"]


def test_fewer_samples_than_the_default_are_taken_and_noted(chatty, tmp_path):
    path = write(tmp_path, lines(PAIR, TALK))
    prompts = load_prompts(path, chatty, fewer=True)
    assert len(prompts.tokens) == 2
    assert prompts.notes == ("2 calibration samples, all there are, in place of 128",)
    with pytest.raises(RequestError, match="expected 128 samples"):
        load_prompts(path, chatty)
    path.write_text("")
    with pytest.raises(RequestError, match="expected at least 1 sample, got 0"):
        load_prompts(path, chatty, fewer=True)


def test_a_folder_and_a_data_set_are_told_how_to_be_named(chatty, tmp_path, monkeypatch):
    write(tmp_path, lines(PAIR))
    with pytest.raises(RequestError, match=r"name a file in it: data\.jsonl"):
        load_prompts(tmp_path, chatty)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(RequestError, match="hf://datasets/org/name"):
        load_prompts("org/name", chatty)


@pytest.mark.parametrize(
    "asked", [{"instruction": "hi there"}, {"prompt": "hi there"}, {"prompt": TALK["messages"][:1]}]
)
def test_prompts_without_answers(tmp_path, plain, asked):
    """Of a task only the prompts are needed; safe data need answers."""
    path = write(tmp_path, lines(asked, PAIR))
    alone, answered = load_prompts(path, plain, answers=False, fewer=True).tokens
    assert words(alone) == ["<s>", "[", "INST", "]", "hi", "there", "[/", "INST", "]"]
    assert words(answered)[-2:] == ["sorry", "no"]
    with pytest.raises(RequestError):
        load_prompts(path, plain, samples=2)
