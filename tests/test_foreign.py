"""What each ``foreign.py`` takes from inside another library is still there, and does what it did."""

import ast
import dataclasses
import importlib
import inspect
import io
import re
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from tiny_models import TINY_MODELS, save_tiny_model

from ablate_shards.errors import EvaluateError

#: The versions with which each was tested last.
TESTED = {
    "datasets": "5.2.0",
    "huggingface_hub": "2.4.0",
    "lm_eval": "0.4.13",
    "transformers": "5.23.0",
}
ROOT = Path(__file__).parents[1]


@contextmanager
def relied_on(library, room):
    """Says what to do when an upgrade has changed what is relied on."""
    module = f"ablate_shards/surgery/{room}/foreign.py"
    try:
        yield
    except Exception as error:
        raise AssertionError(
            f"{library} {version(library)} does not do what {module} relies on; version {TESTED[library]} did. Adapt "
            f"{module} to the new version and name it in tests/test_foreign.py, or exclude it in pyproject.toml"
        ) from error


def test_the_tested_versions_are_those_of_the_constraints():
    pinned = dict(re.findall(r"^([\w.-]+)==(\S+)$", (ROOT / "constraints.txt").read_text(), flags=re.MULTILINE))
    assert {library: pinned[library] for library in TESTED} == TESTED


def test_private_names_of_other_libraries_are_in_foreign_modules_alone():
    """A private name is another library's where no class here has it; ``_replace`` is a named tuple's."""
    own, used = {"_replace"}, set()
    for path in (ROOT / "ablate_shards").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            match node:
                case ast.FunctionDef(name=name) | ast.Attribute(value=ast.Name("self" | "cls"), attr=name):
                    own.add(name)
                case ast.Attribute(attr=name) if re.match(r"_[a-z]", name):
                    used.add((path.name, name))
                case ast.ImportFrom(module=str(module)) if re.search(r"\._[a-z]", module):
                    used.add((path.name, module))
    theirs = {(file, name) for file, name in used if name not in own}
    assert {file for file, _ in theirs} == {"foreign.py"}, sorted(theirs)


# ---------------------------------------------------------------------------------------- huggingface_hub


class Unreadable(io.BytesIO):
    """A file that must not be read."""

    def read(self, *_):
        raise AssertionError("it was read")


def test_an_addition_takes_a_digest_without_reading_the_file():
    pytest.importorskip("huggingface_hub")
    from ablate_shards.surgery.hub.foreign import addition_of, is_stored_as_text, mark_sent

    with relied_on("huggingface_hub", "hub"):
        file = Unreadable()
        addition = addition_of("a.safetensors", 3, "ab" * 32, file, b"abc")
        assert addition.path_or_fileobj is file
        assert (addition.upload_info.size, addition.upload_info.sample) == (3, b"abc")
        assert addition.upload_info.sha256.hex() == "ab" * 32
        fields = {field.name for field in dataclasses.fields(addition)}
        assert {"_upload_mode", "_should_ignore", "_is_uploaded"} <= fields
        assert is_stored_as_text(addition)
        mark_sent(addition)
        assert not is_stored_as_text(addition)


def test_what_is_marked_as_sent_is_committed_by_its_digest_and_not_sent():
    hub = pytest.importorskip("huggingface_hub")
    from ablate_shards.surgery.hub.foreign import addition_of, mark_sent

    with relied_on("huggingface_hub", "hub"):
        from huggingface_hub import _commit_api

        addition = addition_of("a.safetensors", 3, "ab" * 32)
        mark_sent(addition)
        # The network is not there: what asked for it would fail.
        hub.HfApi(endpoint="http://127.0.0.1:9").preupload_lfs_files("me/model", [addition])
        lines = list(_commit_api._prepare_commit_payload([addition], {}, "m", "", None))
        assert lines[1] == {
            "key": "lfsFile",
            "value": {"path": "a.safetensors", "algo": "sha256", "oid": "ab" * 32, "size": 3},
        }


def test_xet_is_asked_for_where_it_can_be_switched_off(monkeypatch):
    hub = pytest.importorskip("huggingface_hub")
    from ablate_shards.surgery.hub.foreign import has_xet

    with relied_on("huggingface_hub", "hub"):
        monkeypatch.setattr(hub.constants, "HF_HUB_DISABLE_XET", True)
        assert not has_xet()


def test_a_refusal_to_copy_has_the_words_and_the_address_it_is_known_by():
    pytest.importorskip("huggingface_hub")
    from ablate_shards.surgery.hub.foreign import refuses_to_copy

    with relied_on("huggingface_hub", "hub"):
        from huggingface_hub import hf_api
        from huggingface_hub.errors import FileDuplicationError

        source = inspect.getsource(hf_api)
        assert "file has no xet hash" in source
        assert re.search(r"duplicate_url = .*/lfs-files/duplicate\"$", source, flags=re.MULTILINE)
        assert refuses_to_copy(ValueError("file has no xet hash."))
        assert refuses_to_copy(FileDuplicationError.__new__(FileDuplicationError))
        assert not refuses_to_copy(ValueError("something else"))
        assert not refuses_to_copy(None)


# ---------------------------------------------------------------------------------------- transformers


@pytest.mark.parametrize("name", ["llama", "qwen3-moe"])
def test_weights_are_loaded_as_transformers_loads_them(tmp_path, name):
    """Mixtures of experts are stored expert by expert and computed as one tensor, so they need a conversion."""
    transformers = pytest.importorskip("transformers")
    from ablate_shards.surgery.capture.foreign import WeightLoader
    from ablate_shards.surgery.model.loading import build

    folder = save_tiny_model(TINY_MODELS[name], tmp_path / "model")
    expected = transformers.AutoModel.from_pretrained(folder, dtype=torch.float32).state_dict()
    config = transformers.AutoConfig.from_pretrained(folder)
    with relied_on("transformers", "capture"):
        model = build(folder, transformers.AutoModel, config, EvaluateError, dtype=torch.float32)
        assert all(parameter.is_meta for parameter in model.parameters())
        loader = WeightLoader(model, torch.device("cpu"))
        with safe_open(folder / "model.safetensors", framework="pt") as file:
            targets = {key: loader.target(key) for key in file.keys()}  # noqa: SIM118 - no mapping
            problems = loader.load({key: file.get_slice(key) for key, target in targets.items() if target})
        assert targets["lm_head.weight"] is None
        assert set(targets.values()) - {None} == {name for name, _ in model.named_parameters()}
        assert problems == []
        found = model.state_dict()
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[key], expected[key]) for key in expected)


def test_weights_of_another_shape_are_named(tmp_path):
    transformers = pytest.importorskip("transformers")
    from ablate_shards.surgery.capture.foreign import WeightLoader
    from ablate_shards.surgery.model.loading import build

    folder = save_tiny_model(TINY_MODELS["llama"], tmp_path / "model")
    config = transformers.AutoConfig.from_pretrained(folder)
    with relied_on("transformers", "capture"):
        model = build(folder, transformers.AutoModel, config, EvaluateError, dtype=torch.float32)
        loader = WeightLoader(model, torch.device("cpu"))
        with safe_open(folder / "model.safetensors", framework="pt") as file:
            (problem,) = loader.load({"model.norm.weight": file.get_slice("model.embed_tokens.weight")})
        assert "norm.weight" in problem


def test_a_trainer_uses_one_device_of_several(tmp_path):
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    from ablate_shards.surgery.finetune.foreign import use_one_device

    with relied_on("transformers", "finetune"):
        arguments = transformers.TrainingArguments(
            output_dir=str(tmp_path), use_cpu=True, per_device_train_batch_size=2
        )
        arguments._n_gpu = 4
        assert (arguments.n_gpu, arguments.train_batch_size) == (4, 8)
        use_one_device(arguments)
        assert (arguments.n_gpu, arguments.train_batch_size) == (1, 2)


def test_a_trainer_can_be_told_that_a_loss_is_a_mean(tmp_path):
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    from ablate_shards.surgery.finetune.foreign import take_loss_as_mean

    folder = save_tiny_model(TINY_MODELS["llama"], tmp_path / "model")
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    ids = torch.tensor([[3, 4, 5]])
    with relied_on("transformers", "finetune"):
        arguments = transformers.TrainingArguments(output_dir=str(tmp_path), use_cpu=True, report_to="none")
        trainer = transformers.Trainer(model=model, args=arguments)
        trainer.current_gradient_accumulation_steps = 4
        batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}
        whole = trainer.training_step(model, dict(batch), num_items_in_batch=torch.tensor(2))
        assert trainer.model_accepts_loss_kwargs
        take_loss_as_mean(trainer)
        assert trainer.training_step(model, dict(batch), num_items_in_batch=None) == pytest.approx(whole / 4)


# ---------------------------------------------------------------------------------------- lm_eval


def test_the_harness_shows_no_bars_and_fetches_no_metrics():
    pytest.importorskip("lm_eval")
    from ablate_shards.surgery.evaluate.foreign import _WITH_BARS, quiet_harness

    with relied_on("lm_eval", "evaluate"):
        import lm_eval.api.task as definitions

        modules = [importlib.import_module(name) for name in _WITH_BARS]
        before = [*(module.tqdm for module in modules), definitions.get_metric]
        with quiet_harness():
            assert [module.tqdm(range(2)).disable for module in modules] == [True] * len(modules)
            assert callable(definitions.get_metric("exact_match"))
            with pytest.raises(EvaluateError, match="none of the harness's own"):
                definitions.get_metric("exact_match", True)
            with pytest.raises(EvaluateError, match="none of the harness's own"):
                definitions.get_metric("not_there")
        assert [*(module.tqdm for module in modules), definitions.get_metric] == before
        # Tasks call it by this name.
        assert "get_metric(metric_name" in inspect.getsource(definitions)


def test_the_datasets_are_counted_by_nobody():
    datasets = pytest.importorskip("datasets")
    pytest.importorskip("lm_eval")
    from ablate_shards.surgery.evaluate.foreign import quiet_harness

    with relied_on("datasets", "evaluate"):
        assert datasets.config.HF_UPDATE_DOWNLOAD_COUNTS in (True, False)
        before = datasets.config.HF_UPDATE_DOWNLOAD_COUNTS
        with quiet_harness():
            assert datasets.config.HF_UPDATE_DOWNLOAD_COUNTS is False
        assert datasets.config.HF_UPDATE_DOWNLOAD_COUNTS is before


def test_the_harness_ties_weights_by_the_method_that_is_kept_from_it():
    pytest.importorskip("lm_eval")
    from ablate_shards.surgery.evaluate.foreign import untied

    with relied_on("lm_eval", "evaluate"):
        from lm_eval.models.huggingface import HFLM

        assert "self.model.tie_weights()" in inspect.getsource(HFLM)

    class Network:
        def tie_weights(self):
            return "tied"

    network = Network()
    with untied(network):
        assert network.tie_weights() is None
    assert network.tie_weights() == "tied"
