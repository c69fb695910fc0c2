"""The walk: what it does to any family, what it leaves alone, and how it goes on after an interruption."""

import copy
import json

import pytest
import torch
import torch.nn.functional as F
from transformers import LlamaForSequenceClassification

from hf_sparse24 import Sparse24Config, prune_, sparsity_report
from hf_sparse24.calibration import pruner, sequential
from hf_sparse24.calibration.distillation import why_not_distilled
from hf_sparse24.calibration.fitting import Schedule, fit_
from hf_sparse24.calibration.matching import Matching
from hf_sparse24.calibration.progress import Progress, fingerprint_data, fingerprint_model
from hf_sparse24.calibration.recipe import Recipe
from hf_sparse24.calibration.sequential import prune_sequentially_
from hf_sparse24.criteria.alps import alps
from hf_sparse24.criteria.objective import layer_objective
from hf_sparse24.criteria.refit import refit
from hf_sparse24.pattern import find_violations, mask_2to4
from hf_sparse24.selection import select
from hf_sparse24.statistics import InputStatistics
from tests.families import FAMILIES, build, inputs

# Magnitude without a refit leaves something to be learnt from so few tokens.
ROUGH = {"method": "magnitude", "refit": None}
MATCHED = Matching(steps=20, learning_rate=1e-2)
SHORT = Schedule(steps=20, learning_rate=1e-2)


def larger(family, dtype=torch.float32):
    """A tiny model whose blocks do something: with the usual initialization all but vanishes beside the residual."""
    model = build(family)
    for parameter in model.parameters():
        parameter.data.mul_(6 if parameter.ndim > 1 else 1)
    return model.to(dtype)


def batches_for(family, number=2):
    torch.manual_seed(2)
    batches = []
    for _ in range(number):
        batch = inputs(family)
        for key, value in batch.items():
            fresh = torch.randn_like(value) if value.is_floating_point() else torch.randint(3, 96, value.shape)
            batch[key] = fresh
        batches.append(batch)
    return batches


def text_batches(number=8, length=24):
    torch.manual_seed(3)
    return [{"input_ids": torch.randint(3, 96, (2, length))} for _ in range(number)]


def walk_(model, batches, device=None, progress=None, **recipe):
    return prune_sequentially_(model, select(model), batches, Recipe(**recipe), device, progress)


def weights_of(model):
    return {key: value.clone() for key, value in model.state_dict().items()}


def assert_same_weights(left, right):
    left, right = left.state_dict(), right.state_dict()
    assert left.keys() == right.keys()
    assert [key for key in left if not torch.equal(left[key], right[key])] == []


def assert_2to4(model):
    for target in select(model).targets:
        weight = getattr(model.get_submodule(target.module_name), target.parameter)
        assert find_violations(weight, target.dim).count == 0, target.name
        assert not torch.signbit(weight[weight == 0]).any(), target.name
        assert (weight == 0).sum() * 2 >= weight.numel(), target.name
        assert weight.isfinite().all(), target.name


@torch.no_grad()
def outputs(model, batches):
    return [model(**batch)[0].float() for batch in batches]


@torch.no_grad()
def divergence(model, dense, batches):
    pairs = zip(outputs(model, batches), outputs(dense, batches), strict=True)
    return sum(
        float(F.kl_div(a.log_softmax(-1), b.log_softmax(-1), reduction="sum", log_target=True)) for a, b in pairs
    )


@pytest.mark.parametrize("family", sorted(set(FAMILIES) - {"albert"}))
def test_every_family_becomes_2to4_and_nothing_else_changes(family):
    model = build(family)
    before = weights_of(model)
    walk_(model, batches_for(family))
    assert_2to4(model)
    pruned = {name for target in select(model).targets for name in (target.name, f"{target.name}.weight")}
    for name, value in model.state_dict().items():
        assert (name in pruned) != torch.equal(value, before[name]), name


def test_experts_that_no_token_reaches_are_pruned_too():
    model = build("switch")
    walk_(model, [{key: torch.randint(3, 96, (1, 2)) for key in ("input_ids", "decoder_input_ids")}])
    assert_2to4(model)


def test_a_projection_that_no_batch_reaches_is_named_in_full_before_a_weight_changes(caplog):
    model = build("bart")
    last = model.model.decoder.layers[1]
    last.encoder_attn.forward = lambda hidden_states, *args, **kwargs: (hidden_states, None)
    before = weights_of(model)
    path = r"model\.decoder\.layers\.1\.encoder_attn\.k_proj"
    with pytest.raises(ValueError, match=rf"reached {path}\. .* modules_to_not_convert=\['{path}'\]"):
        walk_(model, batches_for("bart"), refit="symmetric")
    assert "Pruning stopped" not in caplog.text
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize("method", ["magnitude", "wanda", "ria", "sparsegpt", "alps"])
@pytest.mark.parametrize("refitted", [None, "symmetric", "asymmetric"])
def test_every_method_runs_with_every_refit(method, refitted):
    model = larger("llama")
    walk_(model, text_batches(), method=method, refit=refitted)
    assert_2to4(model)


@torch.no_grad()
def prune_by_hand_(model, batches):
    """The walk without a walk: the whole model runs anew for every group, and plain hooks see its inputs."""
    dense = copy.deepcopy(model)

    def read_by(which, name):
        rows = []
        handle = which.get_submodule(name).register_forward_pre_hook(lambda module, args: rows.append(args[0]))
        for batch in batches:
            which(**batch)
        handle.remove()
        return rows

    for layer in ("model.layers.0.", "model.layers.1."):
        groups = ["self_attn.q_proj self_attn.k_proj self_attn.v_proj", "self_attn.o_proj"]
        for group in [*groups, "mlp.gate_proj mlp.up_proj", "mlp.down_proj"]:
            modules = [model.get_submodule(layer + name) for name in group.split()]
            first = layer + group.split()[0]
            statistics = InputStatistics(modules[0].in_features, asymmetric=True)
            for ours, theirs in zip(read_by(model, first), read_by(dense, first), strict=True):
                statistics.add(ours, theirs)
            dampening = 0.01 + 0.3 * len(statistics.hessian) / statistics.tokens
            objective = layer_objective(
                torch.cat([module.weight for module in modules]), statistics.hessian, dampening
            )
            values = alps(objective)
            mask = mask_2to4(values.abs())
            fitted = refit(objective.asymmetric(statistics.cross), mask, values)
            for module, part in zip(modules, fitted.split([module.out_features for module in modules]), strict=True):
                module.weight.data = part


def test_the_walk_is_the_straightforward_algorithm_made_cheap():
    walked, by_hand, batches = larger("llama"), larger("llama"), text_batches()
    walk_(walked, batches)
    prune_by_hand_(by_hand, batches)
    assert_same_weights(walked, by_hand)


@pytest.mark.parametrize("family", ["llama", "gpt2", "bert_mlm", "falcon", "opt", "mixtral", "gpt_oss", "vit"])
def test_the_output_is_closer_to_the_dense_one_than_magnitudes(family):
    dense = larger(family)
    batches = batches_for(family, 12)
    expected = outputs(dense, batches)

    def error(model):
        pairs = zip(outputs(model, batches), expected, strict=True)
        return sum(float((found - wanted).square().sum()) for found, wanted in pairs)

    by_magnitude, calibrated = copy.deepcopy(dense), copy.deepcopy(dense)
    prune_(by_magnitude, Sparse24Config(method="magnitude"))
    walk_(calibrated, batches)
    assert error(calibrated) < error(by_magnitude)


def test_a_hessian_that_needs_more_dampening_is_reported(monkeypatch):
    def raised(weight, hessian, dampening):
        return layer_objective(weight, hessian, 5.0 if weight.shape[1] == 64 else dampening)

    monkeypatch.setattr("hf_sparse24.calibration.solve.layer_objective", raised)
    walked = walk_(larger("llama"), text_batches())
    assert walked.raised_dampening == {f"model.layers.{layer}.mlp.down_proj": 5.0 for layer in range(2)}
    assert walked.facts() == {"raised_dampening": walked.raised_dampening}


class TestMatching:
    def test_the_held_out_loss_is_not_higher_and_zeros_stay(self):
        model, unmatched = larger("llama"), larger("llama")
        walked = walk_(model, text_batches(), matching=MATCHED, **ROUGH)
        walk_(unmatched, text_batches(), **ROUGH)
        assert list(walked.matched) == ["model.layers.0", "model.layers.1"]
        assert all(fit.after < fit.before for fit in walked.matched.values())
        assert_2to4(model)
        for name, weight in model.model.layers[0].named_parameters():
            assert not torch.equal(weight, unmatched.model.layers[0].get_parameter(name)), name
            assert torch.equal(weight == 0, unmatched.model.layers[0].get_parameter(name) == 0), name

    @pytest.mark.parametrize("target", ["dense", "sparse"])
    def test_a_matched_block_writes_more_nearly_what_its_target_is(self, target):
        dense, batches = larger("llama"), text_batches()
        errors = []
        for matching in (None, Matching(steps=40, learning_rate=1e-2, target=target)):
            model = copy.deepcopy(dense)
            walk_(model, batches, matching=matching, **ROUGH)
            pairs = zip(outputs(model.model, batches), outputs(dense.model, batches), strict=True)
            errors.append(sum(float((found - wanted).square().sum()) for found, wanted in pairs))
        assert errors[1] < errors[0]

    def test_steps_that_only_harm_leave_the_weights_as_they_were(self):
        model, unmatched = larger("llama"), larger("llama")
        walked = walk_(model, text_batches(), matching=Matching(steps=3, learning_rate=1e3))
        walk_(unmatched, text_batches())
        assert all(fit.after == fit.before for fit in walked.matched.values())
        assert_same_weights(model, unmatched)

    @pytest.mark.parametrize("distillation", [None, SHORT])
    @pytest.mark.parametrize("family", ["llama", "opt", "falcon", "bert_mlm", "gpt2"])
    def test_dtypes_and_gradients_are_restored(self, family, distillation):
        model = larger(family, torch.bfloat16)
        frozen = model.get_submodule(select(model).targets[0].module_name).weight
        frozen.requires_grad_(False)
        walk_(model, text_batches(), matching=MATCHED, distillation=distillation)
        assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
        assert {id(p) for p in model.parameters() if not p.requires_grad} == {id(frozen)}
        assert all(parameter.grad is None for parameter in model.parameters())
        assert_2to4(model)

    def test_routers_embeddings_and_the_final_norm_are_not_trained(self):
        model = larger("gpt_oss")
        before = weights_of(model)
        walk_(model, text_batches(4), matching=MATCHED, **ROUGH)
        changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
        untouched = {"model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"}
        untouched |= {f"model.layers.{layer}.mlp.router.{key}" for layer in range(2) for key in ("weight", "bias")}
        assert untouched <= before.keys()
        assert not changed & untouched
        assert "model.layers.0.input_layernorm.weight" in changed
        assert "model.layers.0.self_attn.q_proj.bias" in changed

    def test_padding_has_no_part_in_the_loss(self):
        """What stands under a mask changes nothing that is trained."""
        results = []
        for filler in (3, 90):
            batches = text_batches(4)
            for batch in batches:
                batch["attention_mask"] = torch.ones_like(batch["input_ids"])
                batch["attention_mask"][:, -4:] = 0  # to the right: a causal model never reads it
                batch["input_ids"][:, -4:] = filler
            model = larger("llama")
            walk_(model, batches, matching=MATCHED)
            results.append(model)
        assert_same_weights(*results)


class TestDistillation:
    def test_the_divergence_from_the_dense_model_falls(self):
        dense, batches = larger("llama"), text_batches()
        matched, distilled = copy.deepcopy(dense), copy.deepcopy(dense)
        walk_(matched, batches, **ROUGH)
        walked = walk_(distilled, batches, distillation=SHORT, **ROUGH)
        assert walked.distilled.after < walked.distilled.before
        assert divergence(distilled, dense, batches) < divergence(matched, dense, batches)
        assert_2to4(distilled)
        assert walked.facts()["distilled"] == {"before": walked.distilled.before, "after": walked.distilled.after}

    def test_the_loss_before_is_the_divergence_on_the_held_out_batch(self):
        dense, batches = larger("llama"), text_batches(1)  # a single batch is its own held-out set
        matched = copy.deepcopy(dense)
        walk_(matched, batches)
        walked = walk_(copy.deepcopy(dense), batches, distillation=SHORT)
        tokens = batches[0]["input_ids"].numel()
        # Sums over the vocabulary in another order.
        assert walked.distilled.before == pytest.approx(divergence(matched, dense, batches) / tokens, rel=1e-4)

    def test_embeddings_head_and_final_norm_stay(self):
        model = larger("llama")
        before = weights_of(model)
        walk_(model, text_batches(), distillation=SHORT, **ROUGH)
        for name in ("model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"):
            assert torch.equal(model.state_dict()[name], before[name])
        assert not torch.equal(
            model.model.layers[1].input_layernorm.weight, before["model.layers.1.input_layernorm.weight"]
        )

    @pytest.mark.parametrize("family", ["bert_mlm", "dinov2", "bart", "mixtral", "gpt2"])
    def test_other_families_come_nearer_too(self, family):
        model = larger(family)
        walked = walk_(model, batches_for(family, 4), distillation=SHORT)
        assert walked.distilled.after <= walked.distilled.before
        assert walked.distilled.before > 0
        assert_2to4(model)

    def test_batches_with_labels_are_distilled(self):
        batches = [batch | {"labels": batch.pop("decoder_input_ids")} for batch in batches_for("t5")]
        model = build("t5")
        model.config.decoder_start_token_id = 0
        walk_(model, batches, distillation=SHORT)
        assert_2to4(model)

    @pytest.mark.parametrize(
        ("family", "reason"), [("clip", "takes no second batch"), ("llama", None), ("bert", None), ("whisper", None)]
    )
    def test_what_cannot_be_distilled_is_known_before(self, family, reason):
        model = build(family)
        names = sequential.block_names(model, [target.name for target in select(model).targets])
        chains = sequential.find_chains(model, inputs(family), names)
        found = why_not_distilled(model, inputs(family), chains[-1][-1])
        assert found is None if reason is None else reason in found

    def test_a_classifier_that_picks_one_token_a_text_is_not_distilled(self, tiny_llama):
        tiny_llama.config.pad_token_id = 0
        model = LlamaForSequenceClassification(tiny_llama.config).eval()
        request = {"match_blocks": False, "dataset": text_batches(2)}
        before = weights_of(model)
        with pytest.raises(
            ValueError, match="distill=True cannot distill LlamaForSequenceClassification: the model's"
        ):
            prune_(model, Sparse24Config(distill=True, **request))
        assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())

    def test_by_default_it_is_left_out_with_a_warning_where_it_cannot_be(self, caplog, monkeypatch):
        model = build("clip")
        monkeypatch.setattr("hf_sparse24.prune.Matching", lambda: Matching(steps=2, learning_rate=1e-3))
        prune_(model, Sparse24Config(match_blocks=True, dataset=batches_for("clip")))
        assert "CLIPModel is pruned without distillation: what follows" in caplog.text
        assert model.config.sparse24["calibration"]["distillation"] is None
        assert_2to4(model)


class TestTheModelIsRestored:
    def test_training_mode_caches_and_gradients(self):
        model = build("gpt2").train()
        model.transformer.h[1].eval()
        model.transformer.wte.weight.requires_grad_(False)
        walk_(model, text_batches(2))
        assert model.training
        assert model.transformer.h[0].mlp.dropout.training
        assert not model.transformer.h[1].mlp.dropout.training
        assert not model.transformer.wte.weight.requires_grad
        assert model.transformer.h[0].mlp.c_fc.weight.requires_grad
        assert model.config.use_cache

    def test_dropout_has_no_part_in_the_walk(self):
        trained, evaluated = build("gpt2").train(), build("gpt2")
        for model in (trained, evaluated):
            walk_(model, text_batches(2))
        assert_same_weights(trained, evaluated)

    def test_the_way_experts_run(self):
        model = build("mixtral")
        before = model.get_experts_implementation()
        walk_(model, text_batches(2))
        assert model.get_experts_implementation() == before

    def test_after_an_error_as_well(self, monkeypatch):
        model = build("mixtral").train()
        before = model.get_experts_implementation()
        interrupt(monkeypatch, after=1)
        with pytest.raises(Interruption):
            walk_(model, text_batches(2))
        assert model.training
        assert model.get_experts_implementation() == before
        assert all(parameter.requires_grad for parameter in model.parameters())


class TestDevices:
    def test_the_device_that_the_model_is_on_changes_nothing(self):
        plain, placed = larger("llama"), larger("llama")
        walk_(plain, text_batches())
        walk_(placed, text_batches(), device="cpu")
        assert_same_weights(plain, placed)

    @pytest.mark.gpu
    @pytest.mark.parametrize("family", ["llama", "bart", "mixtral"])
    def test_a_model_on_the_cpu_is_pruned_as_on_the_gpu(self, family):
        batches = batches_for(family, 12)
        lent, placed = larger(family), larger(family).cuda()
        walk_(lent, batches, device="cuda")
        walk_(placed, batches)
        assert {parameter.device.type for parameter in lent.parameters()} == {"cpu"}
        # Embeddings and masks are computed on another device: sums in another order may turn over a near tie.
        same = total = 0
        for target in select(lent).targets:
            masks = [getattr(m.get_submodule(target.module_name), target.parameter).cpu() != 0 for m in (lent, placed)]
            same, total = same + int((masks[0] == masks[1]).sum()), total + masks[0].numel()
        assert same >= 0.999 * total

    @pytest.mark.gpu
    def test_a_model_on_the_cpu_is_matched_on_the_gpu_and_distilled_at_home(self, tmp_path):
        model = larger("llama")
        walk_(model, text_batches(), device="cuda", matching=MATCHED, distillation=SHORT)
        assert {parameter.device.type for parameter in model.parameters()} == {"cpu"}
        assert_2to4(model)

    @pytest.mark.gpu
    def test_after_an_error_every_block_is_at_home(self, monkeypatch):
        model = larger("llama")
        interrupt(monkeypatch, after=5)
        with pytest.raises(Interruption):
            walk_(model, text_batches(), device="cuda")
        assert {parameter.device.type for parameter in model.parameters()} == {"cpu"}


class Interruption(BaseException):
    """Stands for Ctrl-C and for a lost machine alike."""


def interrupt(monkeypatch, after, error=Interruption):
    """Let the walk fail when it has solved so many groups."""
    solved = []

    def solve(*args):
        if len(solved) == after:
            raise error("on purpose")
        solved.append(args)
        return pruner_solve(*args)

    pruner_solve = pruner.solve
    monkeypatch.setattr(pruner, "solve", solve)
    return solved


class TestResuming:
    RECIPES = {
        "plain": {},
        "matched": {"matching": MATCHED},
        "distilled": {"matching": MATCHED, "distillation": SHORT},
        "without the dense model": {"method": "sparsegpt", "refit": None},
    }

    @pytest.mark.parametrize("recipe", RECIPES)
    @pytest.mark.parametrize(("family", "groups"), [("llama", 5), ("bart", 12), ("llama", 2)])
    def test_an_interrupted_walk_ends_as_if_it_had_not_been(self, tmp_path, monkeypatch, recipe, family, groups):
        recipe, batches = self.RECIPES[recipe], batches_for(family, 3)
        undisturbed = larger(family)
        expected = walk_(undisturbed, batches, **recipe)
        with monkeypatch.context() as patch:
            interrupt(patch, after=groups)
            with pytest.raises(Interruption):
                walk_(larger(family), batches, progress=Progress(tmp_path, {}), **recipe)
        finished = len(list(tmp_path.glob("*.safetensors")))
        assert finished == {5: 1, 12: 2, 2: 0}[groups]
        resumed, solved = larger(family), interrupt(monkeypatch, after=-1)
        walked = walk_(resumed, batches, progress=Progress(tmp_path, {}), **recipe)
        assert len(solved) == {5: 4, 12: 14, 2: 8}[groups]  # those of the unfinished blocks
        assert_same_weights(resumed, undisturbed)
        assert walked == expected  # the record is that of the whole run
        again = larger(family)
        walk_(again, batches, progress=Progress(tmp_path, {}), **recipe)
        assert_same_weights(again, undisturbed)

    def test_an_interruption_during_matching_loses_that_block_only(self, tmp_path, monkeypatch):
        calls = []

        def failing(*args):
            calls.append(args)
            if len(calls) == 2:
                raise KeyboardInterrupt
            return match_block_(*args)

        match_block_ = pruner.match_block_
        with monkeypatch.context() as patch:
            patch.setattr(pruner, "match_block_", failing)
            with pytest.raises(KeyboardInterrupt):
                walk_(larger("llama"), text_batches(), progress=Progress(tmp_path, {}), matching=MATCHED)
        assert [file.stem for file in tmp_path.glob("*.safetensors")] == ["model.layers.0"]
        resumed, undisturbed = larger("llama"), larger("llama")
        walk_(resumed, text_batches(), progress=Progress(tmp_path, {}), matching=MATCHED)
        walk_(undisturbed, text_batches(), matching=MATCHED)
        assert_same_weights(resumed, undisturbed)

    @pytest.mark.parametrize("kept", [True, False])
    @pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
    def test_it_says_where_it_stopped_and_how_to_go_on(self, tmp_path, monkeypatch, caplog, kept, error):
        interrupt(monkeypatch, after=5, error=error)
        progress = Progress(tmp_path, {}) if kept else None
        with pytest.raises(error):
            walk_(larger("llama"), text_batches(), progress=progress)
        (message,) = [record.getMessage() for record in caplog.records if "Pruning stopped" in record.getMessage()]
        assert f"Pruning stopped in model.layers.1 ({error.__name__})" in message
        state = f"kept in {tmp_path}; the same call" if kept else "lost; with progress_folder (--progress-folder) the"
        assert f"1 of 2 blocks finished, which are {state}" in message

    def test_it_says_so_in_the_distillation_too(self, monkeypatch, caplog):
        def failing(*args):
            raise KeyboardInterrupt

        monkeypatch.setattr(sequential, "distill_", failing)
        with pytest.raises(KeyboardInterrupt):
            walk_(larger("llama"), text_batches(), distillation=SHORT)
        assert "Pruning stopped in the distillation (KeyboardInterrupt)" in caplog.text
        assert "2 of 2 blocks finished" in caplog.text

    def test_a_walk_that_ends_says_nothing(self, caplog):
        walk_(larger("llama"), text_batches())
        assert "Pruning stopped" not in caplog.text

    def request(self, folder, **kwargs):
        return Sparse24Config(**{"method": "alps", "dataset": text_batches(), "progress_folder": folder} | kwargs)

    OTHERS = {
        "method": {"method": "sparsegpt"},
        "seed": {"seed": 1},
        "refit": {"refit": "symmetric"},
        "dampening": {"dampening": 0.02},
        "matching": {"match_blocks": True},
        "targets": {"modules_to_not_convert": ["down_proj"]},
        "data": {"dataset": text_batches(8, 11)},
    }

    @pytest.mark.parametrize("other", OTHERS)
    def test_the_folder_of_another_run_is_refused(self, tmp_path, other):
        prune_(larger("llama"), self.request(tmp_path))
        model = larger("llama")
        before = weights_of(model)
        with pytest.raises(ValueError, match=f"holds the blocks of another run: .*{other}.* differ"):
            prune_(model, self.request(tmp_path, **self.OTHERS[other]))
        assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())

    def test_the_folder_of_another_model_of_the_same_shape_is_refused(self, tmp_path):
        model = larger("llama")
        prune_(model, self.request(tmp_path))
        with pytest.raises(ValueError, match="holds the blocks of another run: model differ"):
            prune_(model, self.request(tmp_path))  # pruned by now: no longer the model that was begun with
        retrained = larger("llama")
        for parameter in retrained.parameters():
            parameter.data *= 1.001
        with pytest.raises(ValueError, match="holds the blocks of another run: model differ"):
            prune_(retrained, self.request(tmp_path))

    def test_a_folder_with_something_else_in_it_is_refused(self, tmp_path):
        (tmp_path / "thesis.tex").write_text("")
        with pytest.raises(ValueError, match="is not empty and holds no run of hf_sparse24"):
            prune_(larger("llama"), self.request(tmp_path))
        assert [file.name for file in tmp_path.iterdir()] == ["thesis.tex"]

    def test_a_folder_that_another_process_is_just_describing_is_not(self, tmp_path):
        (tmp_path / "4711.partial").write_text("{")
        Progress(tmp_path, {"a": 1})
        assert json.loads((tmp_path / "run.json").read_text()) == {"a": 1}

    def test_a_block_that_was_being_written_is_not_finished(self, tmp_path):
        progress = Progress(tmp_path, {})
        (tmp_path / "model.layers.0.partial").write_bytes(b"half")
        assert not progress.has("model.layers.0")
        assert progress.finished == 0

    def test_tensors_of_the_caller_are_not_written_to(self, tmp_path):
        prune_(larger("llama"), self.request(tmp_path))
        model = larger("llama")
        tensors = {key: value.data for key, value in model.named_parameters()}
        before = weights_of(model)
        prune_(model, self.request(tmp_path))
        assert sparsity_report(model).totals["matrices_2to4"] == 14
        assert all(torch.equal(tensors[key], before[key]) for key in tensors)

    def test_fingerprints_tell_shapes_and_dtypes_apart(self):
        tokens = torch.arange(6)
        kinds = [tokens, tokens.view(2, 3), tokens.int(), tokens.bfloat16(), torch.tensor(3.0)]
        assert len({fingerprint_data([{"x": kind}]) for kind in kinds}) == len(kinds)
        assert fingerprint_data([{"x": tokens}]) == fingerprint_data([{"x": tokens.clone()}])

    def test_fingerprints_tell_what_is_inside_lists_and_beside_tensors(self):
        def batch(value=0.0, size=3, flag=True, name="a"):
            return {"images": [torch.full((size,), value)], "more": {"flag": flag, name: (1, None)}}

        batches = [batch(), batch(1.0), batch(size=4), batch(flag=False), batch(name="b")]
        batches += [batch() | {"images": batch()["images"] * 2}, batch() | {"images": torch.zeros(1, 3)}]
        assert len({fingerprint_data([kind]) for kind in batches}) == len(batches)
        assert fingerprint_data([batch()]) == fingerprint_data([batch()])

    def test_blocks_of_another_version_are_refused(self, tmp_path, monkeypatch):
        prune_(larger("llama"), self.request(tmp_path, method="wanda"))
        monkeypatch.setattr("hf_sparse24.prune.__version__", "0.0.1")
        with pytest.raises(ValueError, match="holds the blocks of another run: version differ"):
            prune_(larger("llama"), self.request(tmp_path, method="wanda"))


def test_weights_that_are_not_there_or_not_finite_are_refused_before_anything_is_run():
    model = larger("llama")
    model.model.layers[1].mlp.up_proj.weight.data[0, 0] = float("nan")
    before = weights_of(model)
    with pytest.raises(ValueError, match=r"model\.layers\.1\.mlp\.up_proj holds 1 NaN"):
        walk_(model, text_batches())
    assert torch.equal(model.model.layers[0].mlp.up_proj.weight, before["model.layers.0.mlp.up_proj.weight"])


def test_a_model_that_overflows_is_refused_before_a_weight_changes():
    model = larger("llama", torch.float16)
    model.model.layers[0].mlp.gate_proj.weight.data.mul_(3e3)
    model.model.layers[0].mlp.up_proj.weight.data.mul_(3e3)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(ValueError, match=r"hidden states behind model\.layers\.0 hold NaN or Inf"):
        walk_(model, text_batches(2))
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_a_later_batch_that_overflows_is_refused_before_a_weight_changes():
    model = larger("llama")
    batches = [{"inputs_embeds": torch.randn(2, 8, 32)} for _ in range(3)]
    batches[2]["inputs_embeds"][1, 3, 5] = float("inf")
    before = weights_of(model)
    message = r"hidden states behind model\.layers\.0 hold NaN or Inf for calibration batch 2, counted from 0"
    with pytest.raises(ValueError, match=message):
        walk_(model, batches)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


class TestRefusedBeforeAWeightChanges:
    def refused(self, message, config, batches, model=None):
        model = model or build("llama")
        before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        with pytest.raises(ValueError, match=message):
            prune_(model, config, batches)
        assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())

    def test_training_in_inference_mode(self):
        with torch.inference_mode():
            self.refused("inference_mode", Sparse24Config(match_blocks=True), [inputs("llama")])

    def test_batches_longer_than_the_context(self):
        long = {"input_ids": torch.ones(1, 2000, dtype=torch.int64)}
        self.refused("context of 1024", Sparse24Config(method="wanda"), [long], build("gpt2"))

    def test_batches_that_the_model_does_not_take(self):
        batches = [{"pixel_values": torch.randn(2, 3, 32, 32)}]
        self.refused("cannot run the first calibration batch, which has pixel_values", Sparse24Config(), batches)


def test_too_little_memory_for_distillation_costs_nothing_but_the_distillation(monkeypatch):
    def full(*args):
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(sequential, "distill_", full)
    model = build("llama")
    report = prune_(model, Sparse24Config(distill=True, match_blocks=False), [inputs("llama")])
    assert report.totals["violating_groups"] == 0
    assert "distilled" not in model.config.sparse24["calibration"]


def test_a_training_that_fails_leaves_the_best_state():
    weight = torch.nn.Parameter(torch.ones(4))
    calls = []

    def loss(index):
        calls.append(index)
        if len(calls) == 3:  # once to begin with, once for a step
            raise RuntimeError("out of luck")
        return weight.sum()

    with pytest.raises(RuntimeError, match="out of luck"):
        fit_([weight], {}, loss, 4, Schedule(steps=100, learning_rate=0.1), seed=0)
    # The second of three steps to the next evaluation failed: the best state is the first one.
    assert torch.equal(weight.detach(), torch.ones(4))


def test_pruned_weights_stay_zero_whatever_the_optimizer_does(monkeypatch):
    class Restless(torch.optim.Adam):
        def step(self):
            super().step()
            for group in self.param_groups:
                for parameter in group["params"]:
                    parameter.data += 1

    monkeypatch.setattr(torch.optim, "Adam", Restless)
    weight, mask = torch.nn.Parameter(torch.tensor([1.0, 0.0, 2.0, 0.0])), torch.tensor([True, False, True, False])
    fit_([weight], {weight: mask}, lambda _: -weight.sum(), 2, Schedule(steps=3, learning_rate=0.1), seed=0)
    assert weight[0] > 3
    assert weight.tolist()[1::2] == [0.0, 0.0]


def test_models_that_differ_anywhere_have_other_fingerprints():
    def changed(change):
        model = build("llama")
        change(model)
        return fingerprint_model(model)

    def last_value(model):
        model.model.layers[1].mlp.down_proj.weight.data[-1, -1] += 1

    def rotary_base(model):
        model.config.rope_parameters = {"rope_type": "default", "rope_theta": 7.0}

    same = changed(lambda model: None)
    assert same == changed(lambda model: None)
    assert len({same, changed(last_value), changed(rotary_base)}) == 3
