"""What the README of the examples promises about the files that ship with them."""

from pathlib import Path
from typing import Any

import pytest
from transformers import AutoConfig, AutoTokenizer

from examples import make_dataset
from examples.lexicon import fine_tuning_part, held_out_part
from examples.make_dataset import DATA, INTENTS, SYSTEM
from examples.score import Row, exact_match, load_rows, reference

TINY_BASE = DATA.parent / "tiny-base"
OPEN_SLOTS = {"name", "place", "dish", "from", "to", "task", "message"}
MEGABYTE = 1_000_000


@pytest.fixture(scope="module")
def splits() -> dict[str, list[Row]]:
    return {split: load_rows(DATA / f"{split}.jsonl") for split in ("train", "test")}


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(TINY_BASE)


def fields(row: Row) -> dict[str, str]:
    """The form of a row; raises ``ValueError`` where a line is not ``key: value``."""
    return dict(line.split(": ", 1) for line in reference(row).split("\n"))


def open_values(rows: list[Row]) -> set[str]:
    forms = [fields(row) for row in rows]
    return {value for form in forms for key, value in form.items() if key in OPEN_SLOTS}


class TestDataset:
    def test_the_script_makes_the_shipped_files_byte_for_byte(self, tmp_path: Path) -> None:
        make_dataset.main(tmp_path)
        for name in ("train.jsonl", "test.jsonl"):
            assert (tmp_path / name).read_bytes() == (DATA / name).read_bytes()

    def test_no_message_occurs_twice_within_or_across_the_splits(
        self, splits: dict[str, list[Row]]
    ) -> None:
        messages = [row["messages"][1]["content"] for rows in splits.values() for row in rows]
        assert len(set(messages)) == len(messages)

    def test_no_open_value_of_the_test_rows_stands_in_a_training_row(
        self, splits: dict[str, list[Row]]
    ) -> None:
        assert not open_values(splits["train"]) & open_values(splits["test"])

    def test_the_lexicon_is_cut_into_two_parts_without_overlap(self) -> None:
        values = list(range(10))
        assert sorted(fine_tuning_part(values) + held_out_part(values)) == values

    @pytest.mark.parametrize("split", ["train", "test"])
    def test_every_row_is_a_message_and_the_form_of_what_it_says(
        self, splits: dict[str, list[Row]], split: str
    ) -> None:
        for row in splits[split]:
            system, user, assistant = row["messages"]
            assert system == {"role": "system", "content": SYSTEM}
            assert (user["role"], assistant["role"]) == ("user", "assistant")
            form = fields(row)
            assert form.pop("intent") in INTENTS
            said = [value for key, value in form.items() if key in OPEN_SLOTS]
            assert all(value in user["content"] for value in said)

    def test_both_splits_hold_every_intent(self, splits: dict[str, list[Row]]) -> None:
        for rows in splits.values():
            found = {fields(row)["intent"] for row in rows}
            assert found == set(INTENTS)


class TestTinyBase:
    def test_the_folder_is_small_and_holds_no_pickle(self) -> None:
        files = [path for path in TINY_BASE.rglob("*") if path.is_file()]
        assert sum(path.stat().st_size for path in files) <= 4 * MEGABYTE
        assert {path.suffix for path in files} <= {".json", ".jinja", ".safetensors"}

    def test_the_vocabularies_of_model_and_tokenizer_agree(self, tokenizer: Any) -> None:
        assert AutoConfig.from_pretrained(TINY_BASE).vocab_size == len(tokenizer)

    def test_padding_is_not_the_end_of_a_turn(self, tokenizer: Any) -> None:
        assert tokenizer.eos_token_id == tokenizer.convert_tokens_to_ids("<|im_end|>")
        assert tokenizer.pad_token_id != tokenizer.eos_token_id

    @pytest.mark.parametrize("text", ["Zürich, 東京 🙂\n\t{'a': 1}", "  two  spaces ", "19:30"])
    def test_any_text_survives_the_tokenizer(self, tokenizer: Any, text: str) -> None:
        assert tokenizer.decode(tokenizer.encode(text, add_special_tokens=False)) == text

    def test_the_mask_covers_each_answer_and_its_end_of_turn_and_nothing_else(
        self, tokenizer: Any, splits: dict[str, list[Row]]
    ) -> None:
        messages = splits["test"][0]["messages"]
        encoded = tokenizer.apply_chat_template(
            [*messages, {"role": "user", "content": "And?"}, messages[-1]],
            return_dict=True,
            return_assistant_tokens_mask=True,
        )
        pairs = zip(encoded["input_ids"], encoded["assistant_masks"], strict=True)
        masked = tokenizer.decode([token for token, inside in pairs if inside])
        assert masked == 2 * (messages[-1]["content"] + "<|im_end|>")

    def test_the_template_with_a_prompt_is_a_prefix_of_the_whole_conversation(
        self, tokenizer: Any, splits: dict[str, list[Row]]
    ) -> None:
        messages = splits["test"][0]["messages"]
        prompt = tokenizer.apply_chat_template(
            messages[:-1], add_generation_prompt=True, tokenize=False
        )
        assert tokenizer.apply_chat_template(messages, tokenize=False).startswith(prompt)


class TestExactMatch:
    def test_it_counts_equal_answers_and_forgives_only_outer_space(self) -> None:
        assert exact_match(["a", " b\n", "C", "d e"], ["a", "b", "c", "de"]) == 0.5
