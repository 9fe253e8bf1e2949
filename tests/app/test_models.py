"""``GET /models``: what it finds in the folders, and what it leaves alone."""

import asyncio
import json
import shutil
import time
from collections.abc import Sequence
from pathlib import Path

import pytest

from app.models.catalogue import Catalogue
from app.models.folders import Described, find_models
from app.models.schemas import BaseModelInfo
from app.uris import Roots
from tests.app.service import Service, make_model

CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "torch_dtype": "bfloat16",
    "max_position_embeddings": 512,
    "vocab_size": 1000,
}


def write_tensors(path: Path, **shapes: list[int]) -> None:
    header = {name: {"dtype": "F32", "shape": shape, "data_offsets": [0, 0]}
              for name, shape in shapes.items()}  # fmt: skip
    text = json.dumps(header | {"__metadata__": {"format": "pt"}}).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text)


class TestModels:
    def names(self, service: Service) -> list[str]:
        return [Path(item["id"]).name for item in service.get("/models")["items"]]

    def test_what_it_says_of_a_model(self, service: Service) -> None:
        folder = make_model(service.models / "deep" / "good", config=json.dumps(CONFIG))
        write_tensors(folder / "model.safetensors", a=[10, 20], b=[5], scalar=[])
        (folder / "chat_template.jinja").touch()
        found = service.get("/models")["items"][0]
        assert found.pop("size_bytes") > 0
        assert found == {
            "id": f"file:{folder}",
            "source": "folder",
            "architecture": "LlamaForCausalLM",
            "parameters": 206,
            "max_positions": 512,
            "dtype": "bfloat16",
            "has_chat_template": True,
            "vocabulary": 1000,
            "limits": {"max_length": 512, "max_rank": 1024, "max_sigma": 1.0},
        }

    def test_every_id_can_be_submitted(self, service: Service) -> None:
        make_model(service.models / "odd % name #1?é")
        ids = [item["id"] for item in service.get("/models")["items"]]
        assert len(ids) == 2
        for name in ids:
            service.submit(base_model=name)

    def test_the_text_part_of_a_larger_model_counts(self, service: Service) -> None:
        config = {"architectures": ["X"], "text_config": CONFIG}
        make_model(service.models / "a", config=json.dumps(config))
        found = service.get("/models")["items"][0]
        assert (found["architecture"], found["vocabulary"]) == ("X", 1000)

    def test_a_template_in_the_tokenizers_settings_counts(self, service: Service) -> None:
        folder = make_model(service.models / "a")
        (folder / "tokenizer_config.json").write_text('{"chat_template": "x"}')
        assert service.get("/models")["items"][0]["has_chat_template"]

    def test_what_cannot_be_read_is_left_out(self, service: Service) -> None:
        for name, config in {
            "list": "[]", "text": "{", "types": '{"vocab_size": "many"}', "bytes": "\udcff",
            "shapes": '{"architectures": 3}',
        }.items():  # fmt: skip
            folder = make_model(service.models / name)
            (folder / "config.json").write_bytes(config.encode(errors="surrogateescape"))
        make_model(service.models / "pickled", "pytorch_model.bin")
        assert self.names(service) == ["tiny"]

    def test_it_goes_three_folders_deep_and_not_through_links(self, service: Service) -> None:
        make_model(service.models / "1" / "2" / "three")
        make_model(service.models / "1" / "2" / "3" / "four")
        make_model(service.models / ".hidden" / "no")
        outside = make_model(service.models.parent / "outside")
        (service.models / "link").symlink_to(outside)
        assert self.names(service) == ["three", "tiny"]

    def test_limits_and_the_hub(self, service: Service) -> None:
        answer = service.get("/models")
        assert answer["hub"] == ["*"]
        assert answer["hub_limits"] == {"max_length": None, "max_rank": 1024, "max_sigma": 1.0}
        assert answer["limits"]["max_rank"] == 1024
        assert answer["limits"]["max_dataset_bytes"] == service.settings.max_dataset_bytes


class TestCatalogue:
    @pytest.fixture
    def catalogue(self, tmp_path: Path) -> Catalogue:
        return Catalogue(Roots([tmp_path], tmp_path / "closed"))

    def test_many_who_ask_at_once_make_it_look_once(
        self, catalogue: Catalogue, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        make_model(tmp_path / "a")
        looks: list[object] = []

        def counting(roots: Sequence[Path], described: Described) -> list[BaseModelInfo]:
            looks.append(None)
            return find_models(roots, described)

        async def ask() -> list[list[BaseModelInfo]]:
            return list(await asyncio.gather(*(catalogue.found() for _ in range(20))))

        monkeypatch.setattr("app.models.catalogue.find_models", counting)
        answers = asyncio.run(ask())
        assert {tuple(model.id for model in answer) for answer in answers} == {
            (f"file:{tmp_path / 'a'}",)
        }
        assert len(looks) == 1

    def test_after_a_few_seconds_it_sees_what_has_come_and_gone(
        self, catalogue: Catalogue, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        async def names() -> list[str]:
            return [Path(model.id).name for model in await catalogue.found()]

        make_model(tmp_path / "a")
        first = time.monotonic()
        assert asyncio.run(names()) == ["a"]
        make_model(tmp_path / "b")
        shutil.rmtree(tmp_path / "a")
        monkeypatch.setattr("app.models.catalogue.time.monotonic", lambda: first + 60)
        assert asyncio.run(names()) == ["b"]

    def test_files_that_stay_are_not_read_again_and_changed_ones_are(self, tmp_path: Path) -> None:
        roots = Roots([tmp_path], tmp_path / "closed")
        folder = make_model(tmp_path / "a", config=json.dumps(CONFIG))
        described: Described = {}
        [first] = find_models(roots, described)
        assert find_models(roots, described)[0] is first
        (folder / "config.json").write_text(json.dumps(CONFIG | {"vocab_size": 2000}))
        assert find_models(roots, described)[0].vocabulary == 2000
        (folder / "chat_template.jinja").touch()
        assert find_models(roots, described)[0].has_chat_template
