"The best weights are what is kept, whatever stops a run; and the figure of the report is honest."
import shutil
from dataclasses import replace

import pytest, torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import GPT2Config, TrainerCallback

from colab_gpt2 import archive_model, extract_archive, finetune, generate, perplexity
from colab_gpt2.config import FinetuneConfig
from colab_gpt2.engine.callbacks import Listener
from colab_gpt2.engine.choosing import BEST, BestWeights, Work, plan_choosing
from colab_gpt2.engine.trying import find_unfinished, load_unfinished
from colab_gpt2.errors import fields_of
from colab_gpt2.model.loading import load_model, load_tokenizer, new_model
from colab_gpt2.preparing import prepare
from colab_gpt2.training import no_step, read_finished


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    "A text that is soon learnt by heart, and a small GPT-2."
    folder = tmp_path_factory.mktemp("text")
    page = "".join(f" = Article {i} = \n \n The tide of day {i * 7 % 61} came in at {i * 5 % 12} o'clock . \n"
                   for i in range(80))
    (folder/"text.txt").write_text(page)
    toy = GPT2Config(n_layer=1, n_embd=32, n_head=2, n_positions=64, vocab_size=8192, attn_pdrop=0., resid_pdrop=0.,
                     embd_pdrop=0.)
    new_model(toy, seed=0).save_pretrained(folder/"toy")
    load_tokenizer("tiny").save_pretrained(folder/"toy")
    return folder


@pytest.fixture(scope="module")
def run(text):
    def run(output_dir, **changes):
        options = dict(model=str(text/"toy"), train_file=str(text/"text.txt"), block_size=32, effective_batch_size=8,
                       max_steps=40, learning_rate=2e-2, eval_steps=4, early_stopping_patience=3, prompt="The",
                       max_new_tokens=2, precision="fp32", cache_dir=str(text/"cache"), output_dir=str(output_dir),
                       progress=False)
        return finetune(**{**options, **changes})
    return run


class Notes(Listener):
    "What is heard of evaluations, with the weights of that moment."
    def __init__(self): self.heard, self.weights = [], {}
    def on_train_begin(self, args, state, control, model=None, **kwargs): self.model = model
    def on_evaluated(self, step, perplexity, best_step):
        self.heard.append((step, perplexity, best_step))
        self.weights.setdefault(step, {name: p.detach().clone() for name, p in self.model.named_parameters()})


class Dies(TrainerCallback):
    "The process is gone after a step, before anything is saved, or once it has saved a checkpoint."
    def __init__(self, step, saved=False): self.step, self.saved = step, saved
    def dies(self, state, saved):
        if (state.global_step, saved) == (self.step, self.saved): raise RuntimeError("killed")
    def on_step_begin(self, args, state, control, **kwargs):
        if not self.saved and state.global_step == self.step: raise RuntimeError("killed")
    def on_save(self, args, state, control, **kwargs): self.dies(state, True)


def killed(run, folder, *steps, saved=False, **changes):
    for step in steps:
        with pytest.raises(RuntimeError, match="killed"): run(folder, callbacks=[Dies(step, saved)], **changes)


def same(result, other):
    "The same weights were chosen, by the same figures."
    assert (result.files, result.best_step, result.evaluations) == (other.files, other.best_step, other.evaluations)
    assert (result.losses, result.steps, str(result.stopped)) == (other.losses, other.steps, str(other.stopped))


@pytest.fixture(scope="module")
def plain(run, tmp_path_factory):
    folder, notes = tmp_path_factory.mktemp("plain")/"out", Notes()
    return run(folder, callbacks=[notes]), folder, notes


def test_the_best_weights_are_saved_and_the_training_ends_when_it_has_no_more_to_gain(plain):
    result, folder, notes = plain
    assert [step for step, _ in result.evaluations] == [*range(4, result.best_step + 13, 4)]
    assert (min(result.evaluations, key=lambda e: e[1])[0], result.steps) == (result.best_step, result.best_step + 12)
    assert [entry[:2] for entry in notes.heard] == list(result.evaluations)
    assert notes.heard[-1][2] == result.best_step and not (folder/BEST).exists()
    saved = {f"transformer.{name}": weight for name, weight in load_file(folder/"model.safetensors").items()}
    assert saved.keys() <= notes.weights[result.steps].keys()
    best, last = (notes.weights[step] for step in (result.best_step, result.steps))
    assert all(torch.equal(saved[name], weight) for name, weight in best.items() if name in saved)
    assert not all(torch.equal(saved[name], weight) for name, weight in last.items() if name in saved)
    assert str(result.stopped).endswith("These weights are kept.") and ("ended", result.stopped) in result._rows()


@pytest.mark.parametrize("steps, saved", [((18, 22), False), ((20,), True), ((30,), False), ((32,), True)])
def test_a_killed_run_chooses_as_one_that_was_not(run, plain, tmp_path, steps, saved):
    "Before and after its best step, in the checkpoint that is the best itself, between stopping and saving the model."
    result, _, _ = plain
    killed(run, tmp_path/"out", *steps, saved=saved, save_steps=5 if not saved else 4)
    same(run(tmp_path/"out", save_steps=7), result)
    assert not (tmp_path/"out"/BEST).exists()


def test_a_new_machine_chooses_the_same_weights_from_the_mirror(run, plain, tmp_path):
    result, _, _ = plain
    mirror = dict(mirror=str(tmp_path/"mirror"))
    killed(run, tmp_path/"out", result.best_step + 6, save_steps=5, **mirror)
    assert list((tmp_path/"mirror").rglob(BEST))
    shutil.rmtree(tmp_path/"out")
    same(run(tmp_path/"out", **mirror), result)


@pytest.mark.parametrize("method", ["full", "lora"])
def test_a_run_that_was_stopped_can_be_tried(run, tmp_path, method):
    "With its best weights, those of step 4, which the checkpoint of step 5 has beside its own; and it says so."
    notes, out = Notes(), tmp_path/"out"
    with pytest.raises(RuntimeError, match="killed"):
        run(out, callbacks=[notes, Dies(8)], method=method, max_steps=40, save_steps=5)
    found = find_unfinished(out)
    assert (found.checkpoint.name, found.step, found.steps, found.best) == ("checkpoint-5", 4, 40, True)
    model, best, layer = load_unfinished(found), notes.weights[4], "transformer.h.0.attn.c_attn.weight"
    expected = best.get(layer)
    if method == "lora":
        down, up = (best[f"base_model.model.{layer}".replace("weight", f"lora_{x}.default.weight")] for x in "AB")
        expected = best[f"base_model.model.{layer}".replace("weight", "base_layer.weight")] + 2 * (up @ down).T
    assert torch.allclose(model.get_parameter(layer), expected, atol=1e-6)
    asked = dict(prompt="The", max_new_tokens=9, seed=1, progress=False)
    with pytest.warns(UserWarning, match="out: step 4 of 40, the best so far, not finished"):
        made = generate(str(out), **asked)
    assert made == generate(model, tokenizer=load_tokenizer("tiny"), **asked)
    with pytest.raises(FileNotFoundError, match="holds no complete model"): load_model(out)  # a training names it


def test_adapters_on_new_weights_are_not_tried_on_published_ones(run, tmp_path):
    with pytest.raises(RuntimeError, match="killed"):
        run(tmp_path/"out", callbacks=[Dies(4)], method="lora", from_scratch=True, max_steps=40, save_steps=2)
    with pytest.raises(ValueError, match="adapters of a model that began with new weights: .* run the same command"):
        load_unfinished(find_unfinished(tmp_path/"out"))


def test_the_last_weights_can_be_asked_for(run, plain, tmp_path):
    result, _, notes = plain
    last = run(tmp_path/"out", load_best_model_at_end=False)
    saved = load_file(tmp_path/"out"/"model.safetensors")
    assert all(torch.equal(saved[n], weight) for n, weight in notes.weights[result.steps].items() if n in saved)
    assert (last.best_step, last.evaluations) == (result.best_step, result.evaluations)
    assert str(last.stopped).endswith("The last weights are kept, as load_best_model_at_end=False asks.")
    assert not list((tmp_path/"out").rglob(BEST))


class Spoils(TrainerCallback):
    "The weights are lost in a step, once."
    def __init__(self, step): self.step = step
    def on_step_begin(self, args, state, control, model=None, **kwargs):
        if state.global_step != self.step: return
        self.step = None
        with torch.no_grad(): next(model.parameters()).fill_(float("nan"))


@pytest.mark.parametrize("step, kept", [(14, [4, 8]), (2, [])], ids=["after the best", "before a checkpoint"])
def test_after_a_divergence_only_what_was_measured_before_counts(run, tmp_path, step, kept):
    "The best of the steps that are gone is gone, too: all later figures are of the second way."
    notes, settings = Notes(), dict(max_steps=20, save_steps=10, early_stopping_patience=0, learning_rate=5e-3)
    with pytest.warns(UserWarning, match="goes back to"):
        result = run(tmp_path/"out", callbacks=[notes, Spoils(step)], **settings)
    told = [step for step, _, _ in notes.heard]
    again = told.index(told[0], 1) if kept else 0
    assert told[again:] == [step for step, _ in result.evaluations] == [4, 8, 12, 16, 20]
    assert dict(result.evaluations)[result.best_step] == min(value for _, value in result.evaluations)


def test_a_way_that_is_given_up_has_written_its_best_weights_before_the_next_begins(run, tmp_path, monkeypatch):
    "On a GPU a thread writes them, which would put them into the place of those that count."
    events = []
    def noted(name, real): return lambda weights, *given: (events.append(name), real(weights, *given))[1]
    for name in "wait", "begin_from": monkeypatch.setattr(BestWeights, name, noted(name, getattr(BestWeights, name)))
    monkeypatch.setattr(BestWeights, "keep", lambda weights, model: None)
    class Spoils(TrainerCallback):
        def on_step_end(self, args, state, control, model=None, **kwargs):
            if state.global_step != 6 or args.learning_rate != 2e-2: return
            next(model.parameters()).data.fill_(float("nan"))
            events.append("spoiled")
    run(tmp_path/"out", callbacks=[Spoils()], max_steps=10, logging_steps=1, save_steps=50)
    assert events[events.index("spoiled") + 1:][:2] == ["wait", "begin_from"]


def test_an_error_inside_an_evaluation_is_no_loss_that_is_not_finite(run, tmp_path, monkeypatch):
    def fails(*given, progress=True, most=None, **options):
        if most: raise RuntimeError("CUBLAS_STATUS_NOT_SUPPORTED")
        return perplexity(*given, progress=progress, **options)
    monkeypatch.setattr("colab_gpt2.measuring.perplexity", fails)
    with pytest.raises(RuntimeError, match="CUBLAS"): run(tmp_path/"out")


def test_how_a_run_that_stopped_early_is_trained_further(plain):
    result, *_ = plain
    assert result.stopped and "early_stopping_patience" in fields_of(no_step(result))
    assert "early_stopping_patience" not in fields_of(no_step(replace(result, stopped="")))


def test_a_run_that_is_asked_to_stop_measures_when_it_resumes(run, plain, tmp_path):
    "Asked in the very step, it does not measure; asked in the middle of a measurement, it breaks it off."
    from colab_gpt2.engine.choosing import Chooser
    result, _, _ = plain
    class Asks(Listener):
        stop = None
        def on_stage(self, stage, stop=None, **facts): self.stop = stop or self.stop
        def on_step_begin(self, args, state, control, **kwargs):
            if state.global_step == 11: self.stop.ask()
    look, seen = Chooser.look, []
    def asked_inside(self, state, model):
        measure = self.measure
        def asks(*given):
            self.trainer.stop.ask()
            return measure(*given)
        if state.global_step == 24: self.measure = asks
        seen.append(state.global_step)
        try: look(self, state, model)
        finally: self.measure = measure
    with pytest.raises(KeyboardInterrupt, match="at step 12"): run(tmp_path/"out", callbacks=[Asks()])
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(Chooser, "look", asked_inside)
        with pytest.raises(KeyboardInterrupt, match="at step 24"): run(tmp_path/"out")
    assert seen[:2] == [12, 16]
    same(run(tmp_path/"out"), result)


def test_adapters_are_chosen_and_merged(run, plain, tmp_path):
    settings = dict(model=str(plain[1]), method="lora", lora_rank=4, learning_rate=0.1, max_steps=24, save_steps=11)
    result = run(tmp_path/"plain", **settings)
    assert result.best_step == 20 < result.steps
    killed(run, tmp_path/"out", 23, **settings)
    kept = list((tmp_path/"out").glob(f"checkpoint-*/{BEST}"))
    assert kept and all("lora" in name for best in kept for name in load_file(best))
    same(run(tmp_path/"out", **settings), result)
    merged = perplexity(load_model(str(tmp_path/"out")), chosen_on(run, tmp_path/"out"), progress=False)
    assert merged.value == pytest.approx(min(value for _, value in result.evaluations), rel=1e-4)
    on_base(tmp_path/"out", plain[1])


def on_base(folder, base):
    "The adapters in `folder`, on `base`, which they name, give the logits of the model there."
    kept = PeftModel.from_pretrained(load_model(str(base)), folder/"adapters").eval()
    assert kept.peft_config["default"].base_model_name_or_path == str(base)
    ids = torch.arange(32)[None]
    with torch.no_grad(): logits = [model(input_ids=ids).logits for model in (kept, load_model(str(folder)).eval())]
    torch.testing.assert_close(*logits, rtol=1e-4, atol=1e-4)


def test_kept_adapters_go_with_their_model_wherever_it_goes(run, plain, tmp_path):
    "To the mirror, and from there to a new machine; into its archive; and away with it."
    settings = dict(model=str(plain[1]), method="lora", max_steps=2, eval_steps=-1, early_stopping_patience=None)
    out, mirror = tmp_path/"out", dict(mirror=str(tmp_path/"mirror"))
    result = run(out, **settings, **mirror)
    assert "out; LoRA's adapters alone in its adapters/" in str(result._rows())
    kept = archive_model(out, tmp_path/"a.tar.gz", progress=False)
    shutil.rmtree(out)
    again = run(out, **settings, **mirror)
    assert again.repeated and again.files == result.files
    assert archive_model(out, tmp_path/"b.tar.gz", progress=False).sha256 == kept.sha256
    on_base(extract_archive(tmp_path/"a.tar.gz", tmp_path/"new", progress=False), plain[1])
    (out/"adapters"/"adapter_model.safetensors").write_bytes(b"?")
    with pytest.warns(UserWarning, match="is skipped: adapters/adapter_model"): run(out, **settings)
    on_base(out, plain[1])
    full = run(out, overwrite_output_dir=True, **{**settings, "method": "full"})
    assert not (out/"adapters").exists() and "LoRA's" not in str(full._rows())


def chosen_on(run, folder):
    "The Blocks that the run in a folder chose on."
    config = replace(read_finished(folder).config, output_dir=str(folder))
    return prepare(config).choosing


def test_a_damaged_model_is_made_again_with_the_best_weights(run, plain, tmp_path):
    result, folder, _ = plain
    shutil.copytree(folder, tmp_path/"out")
    (tmp_path/"out"/"model.safetensors").write_bytes(b"?")
    with pytest.warns(UserWarning, match="is skipped: model.safetensors"): same(run(tmp_path/"out"), result)


def test_a_run_that_continues_another_keeps_its_curve_on_the_same_windows(run, plain, tmp_path):
    "Without patience it goes on where the other one stopped."
    result, folder, _ = plain
    longer = run(tmp_path/"out", resume=str(folder), early_stopping_patience=0)
    assert longer.steps == 40 and longer.evaluations[:len(result.evaluations)] == result.evaluations
    assert longer.files["model.safetensors"] == result.files["model.safetensors"] or longer.best_step > result.steps


@pytest.mark.parametrize("changes, steps", [(dict(max_steps=1, eval_steps=1), [1]), (dict(max_steps=1), [1]),
                                            (dict(max_steps=3, eval_steps=None), []), (dict(max_steps=2, eval_steps=-1,
                                             early_stopping_patience=None), [])], ids=str)
def test_a_short_run(run, tmp_path, changes, steps):
    result = run(tmp_path/"out", **changes)
    assert [step for step, _ in result.evaluations] == steps and result.best_step == (steps or [None])[-1]


def test_a_text_that_chose_says_so_and_one_of_a_token_cannot(run, plain, text, tmp_path):
    "With one held-out text; of a text that is cut in three the validation part chooses and the test part tells."
    assert not plain[0].perplexity_after.chose and "also chose" not in str(plain[0].perplexity_after)
    one = run(tmp_path/"one", max_steps=4, eval_file=str(text/"text.txt"))
    assert (one.perplexity_before.chose, one.perplexity_after.chose) == (False, True)
    assert "this text also chose the weights" in str(one._rows())
    again = run(tmp_path/"one", max_steps=4, eval_file=str(text/"text.txt"), eval_stride=8)
    assert again.repeated and again.perplexity_after.chose
    last = dict(max_steps=4, eval_file=str(text/"text.txt"), load_best_model_at_end=False)
    found = [run(tmp_path/"last", **last), run(tmp_path/"last", **last, eval_stride=8)]  # the last weights: not chosen
    assert found[1].repeated and not any(each.perplexity_after.chose for each in found)
    (tmp_path/"a.txt").write_text("a")
    with pytest.raises(ValueError, match=r"The a\.txt text has 1 token; perplexity"):
        run(tmp_path/"two", max_steps=4, eval_file=str(tmp_path/"a.txt"), early_stopping_patience=None)
    with pytest.raises(ValueError, match="early_stopping_patience needs evaluations; the a.txt text has 1 token"):
        run(tmp_path/"two", max_steps=4, eval_file=str(tmp_path/"a.txt"))


@pytest.mark.parametrize("patience, said", [(8, True), (9, False), (200, False)])
def test_a_patience_that_the_run_cannot_use_up_is_not_told(patience, said):
    "Ten evaluations: where the first was the best, nine without a fall end at the last step, where nothing is left."
    work = Work(steps=100, step_tokens=512, text_tokens=9000, windows=8, context=512, stride=256)
    plan = plan_choosing(FinetuneConfig(eval_steps=10, early_stopping_patience=patience), work)
    assert any("It stops when" in str(reason) for reason in plan.reasons) == said
