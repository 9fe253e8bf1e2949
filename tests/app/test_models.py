"""``GET /models``: what it finds in the folders, and what it leaves alone."""

import json
from pathlib import Path

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
        assert answer["limits"]["max_rank"] == 1024
        assert answer["limits"]["max_dataset_bytes"] == service.settings.max_dataset_bytes
