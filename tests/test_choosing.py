"The best weights are what is kept, whatever stops a run; and the figure of the report is honest."
import shutil

import pytest, torch
from safetensors.torch import load_file
from transformers import GPT2Config, TrainerCallback

from colab_gpt2 import finetune
from colab_gpt2.engine.callbacks import Listener
from colab_gpt2.engine.choosing import BEST
from colab_gpt2.model.loading import load_tokenizer, new_model


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
    saved = load_file(folder/"model.safetensors")
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


def test_the_last_weights_can_be_asked_for(run, plain, tmp_path):
    result, _, notes = plain
    last = run(tmp_path/"out", load_best_model_at_end=False)
    saved = load_file(tmp_path/"out"/"model.safetensors")
    assert all(torch.equal(saved[n], weight) for n, weight in notes.weights[result.steps].items() if n in saved)
    assert (last.best_step, last.evaluations) == (result.best_step, result.evaluations)
    assert str(last.stopped).endswith("The last weights are kept, as load_best_model_at_end=False asks.")
    assert not list((tmp_path/"out").rglob(BEST))
