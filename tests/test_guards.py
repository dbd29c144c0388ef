"What ends a training: a loss that is lost, and the time. What does not: a healthy run."
import math, re, time
from dataclasses import dataclass
from types import SimpleNamespace

import pytest
import torch
from transformers import TrainerControl

from colab_gpt2 import finetune
from colab_gpt2.engine import guards
from colab_gpt2.engine.callbacks import PROBING, TRAINING
from colab_gpt2.engine.checkpoints import find_checkpoints
from colab_gpt2.engine.guards import Diverged, SaveByTime, StopOnDivergence, StopOnInterrupt, TimeLimit, limits_of
from colab_gpt2.model.loading import load_config, load_model, load_tokenizer, new_model


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    "A small model of new weights, and texts."
    place = tmp_path_factory.mktemp("toy")
    shape = load_config("tiny")
    shape.n_layer, shape.n_embd, shape.n_head = 2, 64, 2
    new_model(shape, seed=0).save_pretrained(place/"toy")
    load_tokenizer("tiny").save_pretrained(place/"toy")
    lines = [f" = Article {i} = \n \n The tide of day {i} came in at {i % 12} o'clock . \n" for i in range(60)]
    (place/"text.txt").write_text("".join(lines))
    (place/"odd.txt").write_text("The same again . \n" * 400 + "".join(map(chr, range(0x4e00, 0x4e80))))
    return place


def train(folder, out, text="text.txt", **changes):
    options = dict(model=str(folder/"toy"), train_file=str(folder/text), eval_file=str(folder/"text.txt"),
                   block_size=64, effective_batch_size=2, max_steps=12, max_new_tokens=2, mirror="off",
                   cache_dir=str(folder/"cache"),
                   precision="fp32", on_divergence="stop", torch_compile=False, output_dir=str(out), progress=False)
    return finetune(**{**options, **changes})


@pytest.mark.parametrize("changes", [
    dict(logging_steps=1, effective_batch_size=1), dict(learning_rate=1e-2, logging_steps=1), dict(from_scratch=True),
    dict(method="lora", learning_rate=0.1, logging_steps=1), dict(text="odd.txt", logging_steps=1, max_steps=40,
                                                                   learning_rate=1e-2, effective_batch_size=1)])
def test_a_healthy_run_goes_on_to_its_end(folder, tmp_path, changes):
    assert train(folder, tmp_path, **changes).steps == changes.get("max_steps", 12)


@pytest.mark.parametrize("changes, said", [
    (dict(learning_rate=1e3), "became (nan|inf)|NaN|risen"),
    (dict(learning_rate=3., logging_steps=100), "risen to|NaN"),
    (dict(learning_rate=1e3, save_steps=-1, logging_steps=100, max_steps=3), "became|NaN|risen")])
def test_a_ruined_model_is_neither_kept_nor_saved(folder, tmp_path, changes, said):
    with pytest.raises(Diverged, match=said) as told: train(folder, tmp_path/"out", **changes)
    assert "start again with learning_rate=0.0005, not" in str(told.value) and told.value.what in str(told.value)
    for place in (*find_checkpoints(tmp_path/"out"), tmp_path/"out"):
        if not (place/"model.safetensors").exists(): continue
        assert all(weight.isfinite().all() for weight in load_model(place).parameters())
    assert not (tmp_path/"out"/"model.safetensors").exists()


def test_a_weight_of_no_batch_that_is_lost_is_seen_before_it_is_saved():
    model = torch.nn.Embedding(4, 2)
    model.get_input_embeddings = lambda: model
    guard, state = StopOnDivergence(1e-4), SimpleNamespace(global_step=3)
    args, control = SimpleNamespace(learning_rate=1e-3), TrainerControl(should_save=True)
    guard.on_train_begin(args, state, control, model=model)
    guard.on_step_end(args, state, control, model=model)
    model.weight.data[3, 1] = math.nan
    with pytest.raises(Diverged, match=r"A weight became NaN or infinite by step 3 \(weight\)"):
        guard.on_step_end(args, state, control, model=model)
    state.global_step = 4
    with pytest.raises(Diverged, match="by step 4"): guard.on_train_end(args, state, control, model=model)


def test_looking_at_the_loss_changes_nothing(folder):
    shape = load_config(folder/"toy")
    shape.resid_pdrop = 0.5
    model, batch = new_model(shape, seed=0), dict(input_ids=torch.arange(8)[None], labels=torch.arange(8)[None])
    weights, random = [w.clone() for w in model.parameters()], torch.get_rng_state()
    assert 8 < guards.loss_now(model, [batch]) < 10
    assert torch.equal(torch.get_rng_state(), random) and all(map(torch.equal, model.parameters(), weights))
    assert all(weight.grad is None for weight in model.parameters())


@pytest.fixture
def clock(monkeypatch):
    "time.monotonic() as `clock.now`; any other clock is moved back."
    clock = SimpleNamespace(now=1000.)
    monkeypatch.setattr(guards, "time", SimpleNamespace(monotonic=lambda: clock.now))
    monkeypatch.setattr(time, "time", lambda: 0.)
    return clock


def test_a_checkpoint_comes_by_the_clock_after_a_resume_too(clock):
    saves, control = SaveByTime(5.), TrainerControl()
    state = SimpleNamespace(max_steps=1000, global_step=400)
    saves.on_train_begin(None, state, control)
    def step(seconds):
        clock.now, state.global_step, control.should_save = clock.now + seconds, state.global_step + 1, False
        saves.on_step_end(None, state, control)
        return control.should_save
    assert [step(seconds) for seconds in (100, 199, 1)] == [False, False, True]
    clock.now += 60  # it takes a minute to save: the next one is complete five minutes after this one was begun
    saves.on_save(None, state, control)
    assert [step(seconds) for seconds in (179, 1)] == [False, True]
    clock.now += 600  # longer than the interval: half of that is left to training
    saves.on_save(None, state, control)
    assert [step(seconds) for seconds in (149, 1)] == [False, True]


def run_of(limit, clock, seconds=(10,), saving=0., steps=10, first=0):
    "The step at which a run ends whose steps take so long, again and again."
    state, control = SimpleNamespace(max_steps=steps, global_step=first), TrainerControl()
    limit.on_train_begin(None, state, control)
    while state.global_step < steps and not control.should_training_stop:
        limit.on_step_begin(None, state, control)
        clock.now += seconds[state.global_step % len(seconds)]
        state.global_step += 1
        limit.on_step_end(None, state, control)
    clock.now += saving
    limit.on_save(None, state, control)
    return state.global_step


@pytest.mark.parametrize("seconds, took, steps", [
    (1, 0, 1), (50, 0, 4), (60, 0, 5), (60, 10, 3), (1000, 0, 10)])
def test_a_run_ends_before_its_time(clock, seconds, took, steps):
    stop, begun = StopOnInterrupt(), clock.now
    limit = TimeLimit(seconds, stop=stop, why="because of it", began=begun)
    plan = SimpleNamespace(recipe=SimpleNamespace(method="full"), parameters=0)
    for stage in (PROBING, TRAINING): limit.on_stage(stage, plan=plan, mirror=SimpleNamespace(took=took))
    assert run_of(limit, clock) == steps
    assert steps == 1 or clock.now - begun + 2 * took <= seconds
    assert (stop.code, stop.asked) == ((75, True) if steps < 10 else (130, False))


def test_the_longest_step_is_what_may_come_again(clock):
    stop, begun = StopOnInterrupt(), clock.now
    assert run_of(TimeLimit(60, stop=stop, why="because of it"), clock, seconds=(5, 30, 5)) == 2
    assert stop.why == " because of it, and the rest takes about 4 more sessions"


def test_how_many_more_sessions_the_rest_takes_is_told_alike_by_short_sessions_and_long_ones(clock):
    "A session of 100 s is ready to train after 40; some end early, and one step took three times as long."
    first, told = 0, []
    for budget, took in (100, 10), (100, 11), (55, 10), (100, (9, 27, 9)), (100, 10), (55, 9), (100, 10):
        limit = TimeLimit(100, stop=(stop := StopOnInterrupt()), why="", began=clock.now)
        limit.end, clock.now = clock.now + budget, clock.now + 40
        first = run_of(limit, clock, took if isinstance(took, tuple) else (took,), steps=40, first=first)
        told.append(int(re.search("about ([0-9]+) more", stop.why)[1]))
    assert all(-3 < after - before < 2 for before, after in zip(told, told[1:])) and told[0] == 7, (told, first)


def test_no_more_sessions_are_told_than_steps_are_left(clock):
    stop = StopOnInterrupt()
    run_of(TimeLimit(1, stop=stop, why=""), clock, steps=7)
    assert stop.why.endswith("about 6 more sessions")


def test_colab_ends_a_session_twelve_hours_after_its_start(monkeypatch):
    config, hours = SimpleNamespace(max_minutes=None), 3600.
    monkeypatch.setattr(guards, "in_colab", lambda: "")
    assert limits_of(config, None, hours) == []
    monkeypatch.setattr(guards, "in_colab", lambda: "kernel")
    assert [limit.end for limit in limits_of(config, None, 3 * hours)] == [12 * hours]
    assert limits_of(config, None, 11.95 * hours) == limits_of(config, None, 20 * hours) == []


def test_a_long_run_on_colab_is_told_that_its_page_must_be_used(monkeypatch, recwarn):
    plan = SimpleNamespace(seconds=3 * 3600.)
    guards.warn_of_idle(plan)
    assert not recwarn
    monkeypatch.setattr(guards, "in_colab", lambda: "kernel")
    guards.warn_of_idle(SimpleNamespace(seconds=3600.))
    assert not recwarn
    guards.warn_of_idle(plan)
    assert "takes about 3 h 0 min, and Colab ends a session" in str(recwarn[0].message)


@dataclass
class OfSteps:
    "What a Plan says of steps."
    steps: int
    step_seconds: float
    seconds: float = 0.
    reasons: tuple = ()


def test_a_demo_has_time_for_evaluating_it_again(clock):
    limit = TimeLimit(100)
    limit.on_stage("evaluating before")
    clock.now += 20
    limit.on_stage(PROBING)
    clock.now += 10
    assert limit.shorten(OfSteps(104, 1.)).steps == 50  # 100 s - 20 - 10 - 20
