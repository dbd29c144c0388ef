"Two processes that train one model: as one does, and what happens when one of them stops, dies or differs."
import contextlib, faulthandler, io, math, os, pickle, queue, re, signal, socket, sys, time, warnings
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import torch
from helpers.forks import launched
from helpers.toys import small_trainer, write_tide, write_toy
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, GPT2LMHeadModel, LlamaConfig, TrainerCallback

from colab_gpt2 import FinetuneConfig, beginning, launching, ranks, training
from colab_gpt2.cli import one_line, tell_error
from colab_gpt2.engine import probe
from colab_gpt2.engine.callbacks import AFTER, BEFORE, LOADING, PROBING, TRAINING, Listener
from colab_gpt2.engine.checkpoints import check_intact, find_checkpoints, read_manifest
from colab_gpt2.engine.guards import Diverged
from colab_gpt2.legacy.run_language_modeling import main
from colab_gpt2.model.tune import repeated_blocks
from colab_gpt2.ranks import RANKS, Lost, agreed
from colab_gpt2.signals import Interrupted
from colab_gpt2.training import finetune

@pytest.fixture(scope="module")
def text(tmp_path_factory):
    place = write_tide(tmp_path_factory.mktemp("text"), 40, n_layer=1, n_embd=32, n_head=2, n_positions=64)
    small = dict(hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, bos_token_id=None,
                 eos_token_id=None)
    write_toy(place/"llama", LlamaConfig(vocab_size=8192, max_position_embeddings=64, **small))
    return place


def settings(text, output_dir, **changes):
    "The last step of an epoch is shorter, and two processes cannot share it evenly."
    files = {f"{name}_file": str(text/f"{name}.txt") for name in ("train", "eval")}
    files |= dict(cache_dir=str(text/"cache"), output_dir=str(output_dir))
    return dict(model=str(text/"toy"), block_size=32, effective_batch_size=6, max_steps=20, learning_rate=5e-3,
                logging_steps=1, warmup_steps=0, prompt="The", max_new_tokens=4, precision="fp32", eval_steps=5,
                progress=False, mirror="off", **files) | changes


def free_port():
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def told(function, *args):
    "What `function` gives; in the place of an error its line, or (exit code, line) of an Interrupted."
    torch.set_num_threads(1)
    faulthandler.dump_traceback_later(60, exit=True)  # in stderr
    try: return function(*args)
    except Interrupted as e: return e.code, str(e)
    except Exception as e: return type(e).__name__, one_line(e)


@contextlib.contextmanager
def started(function, *args, ranks=2, world=2, **env):
    "Processes of a run that call `function(*args)` each."
    env = dict(WORLD_SIZE=str(world), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(free_port())) | env
    def of(rank): return env | dict(RANK=str(rank), LOCAL_RANK=str(rank))
    with contextlib.ExitStack() as running:
        yield [running.enter_context(launched(told, function, *args, env=of(rank))) for rank in range(ranks)]


def pair(function, *args, **options):
    "What two processes give that call `function(*args)`."
    with started(function, *args, **options) as processes:
        for process in processes: process.join(120)
    for process in processes: assert process.exitcode == 0, process.done.stderr
    return [process.done.result for process in processes]


def same(result, other, rel=1e-5):
    losses = [[entry["loss"] for entry in each.losses] for each in (result, other)]
    assert losses[0] == pytest.approx(losses[1], rel=rel)
    assert result.perplexity_after.value == pytest.approx(other.perplexity_after.value, rel=1e-5)
    ours, theirs = (load_file(Path(each.output_dir)/"model.safetensors") for each in (result, other))
    for name, weight in ours.items():  # AdamW moves a weight whose gradient is rounding alone
        torch.testing.assert_close(weight, theirs[name], atol=2e-4, rtol=1e-3)


@pytest.fixture(scope="module")
def alone(text, tmp_path_factory): return finetune(**settings(text, tmp_path_factory.mktemp("alone")/"out"))


class Signal(TrainerCallback):
    "A signal for one of the processes in the middle of a step."
    def __init__(self, step, rank, number=signal.SIGTERM): self.step, self.rank, self.number = step, str(rank), number
    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == self.step and os.environ.get("RANK", "0") == self.rank: signal.raise_signal(self.number)


class SignalAt(Listener):
    "A signal for the second process at a stage."
    def __init__(self, stage): self.stage = stage
    def on_stage(self, stage, **facts):
        if stage == self.stage and RANKS.own == 1: signal.raise_signal(signal.SIGTERM)


class Short(TrainerCallback):
    "Memory that runs out in one of the processes."
    def on_train_begin(self, args, state, control, model=None, **kwargs):
        def fail(module, given):
            if RANKS.own == 1 and len(given[0]) > 1: raise torch.OutOfMemoryError("CUDA out of memory")
        self.hook = repeated_blocks(model)[0].register_forward_pre_hook(fail)
    def on_train_end(self, args, state, control, **kwargs): self.hook.remove()


class Spoils(TrainerCallback):
    "Weights that are NaN in one of the processes after a step, until the learning rate is halved."
    def __init__(self, step): self.step, self.begun = step, []
    def on_train_begin(self, args, state, control, **kwargs): self.begun.append(state.global_step)
    def on_step_end(self, args, state, control, model=None, **kwargs):
        if state.global_step == self.step and args.learning_rate == 5e-3 and os.environ["RANK"] == "1":
            next(model.parameters()).data.fill_(float("nan"))


def several_runs(text, folder):
    "One after the other, so that a pair of processes is started once: -> what each gave."
    asked, training.keep_freed_memory = [], lambda *keep: asked.append(keep)
    def run(name, **changes):
        asked.clear()
        return told(lambda: finetune(**settings(text, folder/name, **changes)))
    def spoil(name, step): return run(name, callbacks=[spoils := Spoils(step)], save_steps=5), spoils.begun
    buffered = run("buffered", model=str(text/"llama"), callbacks=[Short()], eval_steps=-1, max_steps=4)
    return dict(plain=run("plain"), kept=[*asked], short=run("short", callbacks=[Short()], eval_steps=-1, max_steps=6),
                stopped=run("stopped", callbacks=[Signal(7, 1)]), begun=run("begun"), again=run("plain"),
                early=run("early", callbacks=[SignalAt(BEFORE)], max_steps=4, eval_steps=-1),
                late=run("late", callbacks=[SignalAt(AFTER)], max_steps=4, eval_steps=-1),
                few=run("few", effective_batch_size=1), lora=run("lora", method="lora", max_steps=6, eval_steps=-1),
                mirrored=run("mirrored", mirror=str(folder/"mirror"), save_steps=5, max_steps=12),
                spoiled=spoil("spoiled", 7), unsaved=spoil("unsaved", 10), buffered=buffered,
                divided=run("divided", fsdp="on"), halted=run("halted", fsdp="on", callbacks=[Signal(7, 1)]),
                resumed=run("handed over", fsdp="on", gradient_checkpointing=True), given_back=[*asked])


@pytest.fixture(scope="module")
def runs(text, tmp_path_factory):
    "What two processes gave, rank by rank. The runs in \"begun\" and \"handed over\" were begun by one process."
    folder = tmp_path_factory.mktemp("pair")
    for name in ("begun", "handed over"):
        with pytest.raises(Interrupted): finetune(**settings(text, folder/name, callbacks=[Signal(7, 0)]))
    return pair(several_runs, text, folder)


def test_two_processes_train_as_one_does(runs, alone):
    result, other = (rank["plain"] for rank in runs)
    same(result, alone)
    assert result.perplexity_before.value == pytest.approx(alone.perplexity_before.value, rel=1e-6)
    assert [step for step, _ in result.evaluations] == [step for step, _ in alone.evaluations]
    assert (result.best_step, result.steps, result.plan.blocks_per_step) == (alone.best_step, 20, 6)
    assert result.fingerprint == alone.fingerprint and result.config.num_processes == 2
    assert other.losses == result.losses and other.samples == result.samples


def test_perplexity_is_the_sum_of_the_shares(runs, alone):
    for one, two in ((alone.perplexity_before, runs[1]["plain"].perplexity_before),
                     (alone.perplexity_after, runs[1]["plain"].perplexity_after)):
        assert two.tokens == one.tokens
    assert runs[0]["plain"].perplexity_before == runs[1]["plain"].perplexity_before


def test_a_finished_run_is_known_to_all(runs):
    assert all(rank["again"].repeated and rank["again"].losses == rank["plain"].losses for rank in runs)


def test_a_signal_for_one_process_stops_all_with_a_checkpoint(runs):
    assert [rank["stopped"][0] for rank in runs] == [143, 143]
    folder = Path(runs[0]["plain"].output_dir).parent/"stopped"
    assert runs[0]["stopped"][1].startswith(f"Stopped at step 8 of 20; saved in {folder}/checkpoint-8")
    check_intact(folder/"checkpoint-8")
    assert read_manifest(folder/"checkpoint-8")["how"]["processes"] == 2


@pytest.mark.parametrize("kind", ["stopped", "halted"], ids=["of copies", "of a divided model"])
def test_a_checkpoint_of_two_processes_resumes_in_one(runs, text, alone, kind):
    assert [rank[kind][0] for rank in runs] == [143, 143]
    with pytest.warns(UserWarning, match="by 2 processes before"):
        result = finetune(**settings(text, Path(runs[0]["plain"].output_dir).parent/kind))
    assert result.resumed_from.endswith("checkpoint-8")
    same(result, alone)


def test_a_checkpoint_of_one_process_resumes_in_two(runs, alone):
    assert runs[0]["begun"].resumed_from.endswith("checkpoint-8")
    same(runs[0]["begun"], alone)


def test_memory_that_runs_out_in_one_process_lowers_the_micro_batch_of_all(runs, text, tmp_path):
    result, other = (rank["short"] for rank in runs)
    assert result.plan.recipe.micro_batch == other.plan.recipe.micro_batch == 1
    same(result, finetune(**settings(text, tmp_path/"out", eval_steps=-1, max_steps=6)))


def test_memory_that_runs_out_in_a_model_with_buffers(runs, text, tmp_path):
    result, other = (rank["buffered"] for rank in runs)
    assert result.plan.recipe.micro_batch == other.plan.recipe.micro_batch == 1
    same(result, finetune(**settings(text, tmp_path/"out", model=str(text/"llama"), eval_steps=-1, max_steps=4)))


def test_a_divided_model_learns_as_one_process_does_and_is_saved_whole(runs, alone):
    result, other = (rank["divided"] for rank in runs)
    same(result, alone)
    assert result.plan.recipe.shards == 2 and "FSDP in 2 parts" in str(result.plan)
    assert other.losses == result.losses and other.perplexity_after == result.perplexity_after
    assert dict(result.evaluations) == pytest.approx(dict(alone.evaluations), rel=1e-5)
    saved = AutoModelForCausalLM.from_pretrained(result.output_dir)
    assert type(saved) is GPT2LMHeadModel and saved.config.architectures == ["GPT2LMHeadModel"]
    files = [{path.name for path in find_checkpoints(each.output_dir)[-1].iterdir()} for each in (result, alone)]
    assert files[0] ^ files[1] == {"rng_state_0.pth", "rng_state.pth"}


def test_freed_memory_is_kept_unless_the_model_is_divided(runs):
    "A divided one frees what was whole for a moment, and the next does not fit into its pieces."
    for rank in runs: assert (rank["kept"], rank["given_back"]) == ([(True,)], [(False,)])


def test_a_checkpoint_of_one_process_resumes_in_a_divided_model(runs, alone):
    assert runs[0]["resumed"].resumed_from.endswith("checkpoint-8")
    assert runs[0]["resumed"].plan.recipe.gradient_checkpointing
    same(runs[0]["resumed"], alone)


def test_more_processes_than_blocks_are_refused_by_all(runs):
    said = "A step has 1 block, and there are 2 processes, each of which needs one: start fewer, or raise "
    assert [rank["few"] for rank in runs] == [("ValueError", f"{said}--effective-batch-size.")] * 2


def test_lora_by_two_processes(runs, text, tmp_path):
    result, other = (rank["lora"] for rank in runs)
    alone = finetune(**settings(text, tmp_path/"out", method="lora", max_steps=6, eval_steps=-1))
    same(result, alone)
    assert result.losses == other.losses and (Path(result.output_dir)/"adapters"/"adapter_model.safetensors").exists()


def test_the_mirror_of_two_processes_has_complete_copies(runs):
    result = runs[0]["mirrored"]
    [place] = (Path(result.output_dir).parent/"mirror").glob("**/mirrored-*")
    assert find_checkpoints(place)
    for path in find_checkpoints(place): check_intact(path)
    ours, copied = (load_file(folder/"model.safetensors") for folder in (Path(result.output_dir), place/"finished"))
    assert all(torch.equal(weight, copied[name]) for name, weight in ours.items())


@pytest.mark.parametrize("seen", ["spoiled", "unsaved"], ids=["when a loss is logged", "when they are to be saved"])
def test_weights_lost_in_one_process_take_all_back(runs, seen):
    for result, begun in (rank[seen] for rank in runs):
        assert begun == [0, 5] and result.steps == 20 and result.losses == runs[0][seen][0].losses
    weights = load_file(Path(runs[0][seen][0].output_dir)/"model.safetensors")
    assert all(weight.isfinite().all() for weight in weights.values())


def one_run(text, output_dir, changes=None, waits=()):
    "`changes`: by rank."
    own = (changes or {}).get(int(os.environ["RANK"]), {})
    result = finetune(**settings(text, output_dir, callbacks=list(waits), **own))
    return result.steps


class Slow(TrainerCallback):
    "Says how far it is by a file, and takes its time."
    def __init__(self, folder): self.folder = folder
    def on_step_end(self, args, state, control, **kwargs):
        (self.folder/f"step-{state.global_step}").touch()
        time.sleep(0.05)


def test_a_killed_process_ends_the_other_with_a_line_and_a_complete_checkpoint(text, tmp_path):
    saving = {rank: dict(save_steps=3) for rank in (0, 1)}
    with started(one_run, text, tmp_path/"out", saving, [Slow(tmp_path)]) as processes:
        until = time.monotonic() + 100
        while not (tmp_path/"step-7").exists() and time.monotonic() < until: time.sleep(0.02)
        os.kill(processes[1].pid, signal.SIGKILL)
        processes[0].join(60)
        assert not processes[0].is_alive()
    assert processes[0].done.result == ("Lost", "Another process of this run has ended, and this one with it.")
    newest = find_checkpoints(tmp_path/"out")[-1]
    check_intact(newest)
    assert not (tmp_path/"out"/".running.json").exists()
    resumed = finetune(**settings(text, tmp_path/"out", save_steps=3))
    assert resumed.resumed_from == str(newest) and resumed.steps == 20


class Breaks(TrainerCallback):
    "Fails in one of the processes, while the other waits for its part of a pass."
    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == 3 and RANKS.own == 1: raise OSError("The disk of this machine is gone")


def as_the_command(text, output_dir):
    ranks.GRACE = 0.5
    try: finetune(**settings(text, output_dir, callbacks=[Breaks()]))
    except Exception as e: tell_error("colab-gpt2", e)


def test_an_error_of_one_process_alone_ends_all(text, tmp_path):
    with started(as_the_command, text, tmp_path/"out") as processes:
        for process in processes: process.join(20)
        assert not any(process.is_alive() for process in processes)
    assert [process.exitcode for process in processes] == [0, 1]  # the second did not wait for ever
    lines = [[line for line in process.done.stderr.splitlines() if "colab-gpt2" in line] for process in processes]
    assert lines[0] == ["colab-gpt2: Another process of this run has ended, and this one with it."]
    [line] = lines[1]
    assert line.startswith("colab-gpt2, process 1: ") and "The disk of this machine is gone" in line


def test_a_signal_for_one_process_outside_the_training_leaves_none_waiting(runs):
    "Before it all stop at their first step; after it all end as they would."
    for early, late in ((each["early"], each["late"]) for each in runs):
        assert early[0] == 143 and early[1].startswith("Stopped at step 1 of 4; saved in "), early
        assert late.steps == 4 and late.perplexity_after


def with_its_own_text(text, folder):
    "Another text in each process, of the same name."
    place = folder/os.environ["RANK"]
    place.mkdir()
    (place/"mine.txt").write_text((text/"train.txt").read_text() + place.name)
    os.chdir(place)
    return told(lambda: finetune(**settings(text, folder/"out", train_file="mine.txt")))


def test_different_texts_are_refused_by_all(text, tmp_path):
    first, second = pair(with_its_own_text, text, tmp_path)
    assert first == second and first[0] == "ValueError", first
    assert first[1] == "The processes have read different files: process 1 has other text than process 0."


def test_different_settings_are_refused_by_all(text, tmp_path):
    first, second = pair(one_run, text, tmp_path/"out", {1: dict(learning_rate=1e-3)})
    said = "The processes have different settings: --learning-rate is 0.005 in process 0 and 0.001 in process 1."
    assert first == second == ("ValueError", said)
    assert not (tmp_path/"out").exists()


def after_meeting(text, output_dir):
    torch.distributed.init_process_group("gloo")
    return one_run(text, output_dir)


def test_processes_that_have_met_already_train(text, tmp_path):
    "As Ray Train starts them: its group listens at MASTER_PORT."
    assert pair(after_meeting, text, tmp_path/"out") == [20, 20]


@pytest.mark.parametrize("launcher", [
    "torchrun --nproc-per-node 2 -m colab_gpt2 finetune", "colab-gpt2 finetune --num-processes 2",
    "accelerate launch --multi_gpu --num_processes 2 --num_machines 1 --mixed_precision no --dynamo_backend no "
    "-m colab_gpt2 finetune"], ids=lambda words: words.split()[0])
def test_the_launchers(shell, text, tmp_path, alone, launcher):
    "The same model by each, and a report by the first process alone."
    given = settings(text, tmp_path/"out")
    del given["progress"]
    words = [word for name, value in given.items() for word in (f"--{name.replace('_', '-')}", value)]
    ran = shell(*launcher.split(), *words, OMP_NUM_THREADS="1", MASTER_PORT=str(free_port()))
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.count("\nsample after ") == 1
    assert re.search(r"Fine-tuning: .*loss \d\.\d+, .* tokens/s", ran.stderr)
    assert read_manifest(find_checkpoints(tmp_path/"out")[-1])["how"]["processes"] == 2
    result = finetune(**settings(text, tmp_path/"out"))
    assert result.repeated
    same(result, alone)


def of_2020(text, folder):
    words = f"--output_dir={folder/'out'} --do_train --do_eval --model_name_or_path={text/'toy'} --max_steps=2"
    files = f"--train_data_file={text/'train.txt'} --eval_data_file={text/'eval.txt'} --block_size=32"
    return main([*words.split(), *files.split(), f"--local-rank={os.environ['LOCAL_RANK']}"])


def test_the_command_of_2020_by_torchs_launcher(text, tmp_path):
    with started(of_2020, text, tmp_path) as processes:
        for process in processes: process.join(120)
    assert [process.done.result for process in processes] == [0, 0], processes[0].done.stderr
    assert "perplexity = " in (tmp_path/"out"/"eval_results_lm.txt").read_text()
    assert processes[0].done.stderr.count("***** Eval results *****") == 1 and not processes[1].done.stderr


def test_a_process_that_never_comes(text, tmp_path):
    waits = {0: dict(trainer_args=dict(ddp_timeout=2))}
    [(kind, said)] = pair(one_run, text, tmp_path/"out", waits, ranks=1)
    assert kind == "TimeoutError" and said.startswith("Not all of the 2 processes met at 127.0.0.1:")


def joins_slowly(there):
    "-> whether the second was there, slow as it was, when this process had joined."
    grouped = torch.distributed.new_group
    def slow(**options):
        group = grouped(**options)
        if os.environ["RANK"] == "1":
            time.sleep(0.5)
            there.touch()
        return group
    torch.distributed.new_group = slow
    ranks.join(60, cpu=True)
    return there.exists()


def test_none_goes_on_before_all_are_there(tmp_path):
    "The others find each other by the first: it may end at once."
    assert pair(joins_slowly, tmp_path/"there") == [True, True]


def meets_nobody():
    def refused(**options): raise torch.distributed.DistNetworkError("Connection reset by peer")
    torch.distributed.new_group = refused
    ranks.join(60, cpu=True)


def test_a_meeting_that_breaks_off_is_told_as_one_that_never_was():
    for kind, said in pair(meets_nobody):
        assert kind == "TimeoutError" and said.startswith("Not all of the 2 processes met")


@pytest.mark.parametrize("rank, all", [("2", "2"), ("-1", "2"), ("3", "")])
def test_a_rank_that_cannot_be(text, tmp_path, rank, all):
    "torch would wait for ever."
    with launched(told, one_run, text, tmp_path/"out", env=dict(RANK=rank, WORLD_SIZE=all)) as process: process.join(60)
    kind, said = process.done.result
    assert kind == "OSError" and said.startswith(f"RANK is {rank} and WORLD_SIZE {all or 1}: give each of so many")


def test_a_rank_that_is_no_number_is_one_line(shell, text):
    ran = shell("colab-gpt2", "finetune", "--model", text/"toy", "--train-file", text/"train.txt", "--max-steps", 1,
                RANK="one", WORLD_SIZE="2")
    said = "RANK is one and WORLD_SIZE 2: give each of so many processes its own RANK"
    assert ran.returncode == 1 and ran.stderr.count("\n") == 1 and said in ran.stderr


@pytest.mark.parametrize("all", ["2", "0", "two", ""])
def test_without_a_rank_a_process_speaks(monkeypatch, all):
    monkeypatch.setenv("WORLD_SIZE", all)
    assert ranks.first() and ranks.expected() == (2 if all == "2" else 1)

def test_without_a_rank_the_command_line_speaks(shell):
    assert "memory" in shell("colab-gpt2", "check", WORLD_SIZE="2").stdout


ENDS = """import atexit, os, runpy, sys
atexit.register(os.write, 1, b"Python ends")
sys.argv[1:] = [{word!r}]
runpy.run_module({module!r}, run_name="__main__")"""

@pytest.mark.parametrize("module, word, code", [
    ("colab_gpt2", "--help", 0), ("colab_gpt2", "--no-such-flag", 2),
    ("colab_gpt2.run_language_modeling", "--output_dir=new", 2)])
def test_only_the_first_ends_as_python_does(shell, module, word, code):
    "A thread of torch that still gives up what it exchanged last would abort that, once in some twenty times."
    ran = [shell(sys.executable, "-c", ENDS.format(word=word, module=module), RANK=rank, WORLD_SIZE="2")
           for rank in ("0", "1")]
    assert [each.returncode for each in ran] == [code, code]
    assert ["Python ends" in each.stdout for each in ran] == [True, False]


def test_a_port_in_use(text, tmp_path):
    with socket.socket() as other:
        other.bind(("", 0))
        other.listen()
        port = other.getsockname()[1]
        [(kind, said)] = pair(one_run, text, tmp_path/"out", ranks=1, MASTER_PORT=str(port))
    assert (kind, said.partition(":")[0]) == ("OSError", f"MASTER_PORT {port} is in use on this machine")


class Watcher(Listener):
    "Hears of a run in other processes, asks for a checkpoint at a step, and does something at another."
    def __init__(self, save=None, step=None, action=None):
        self.save, self.step, self.action = save, step, action
        self.steps, self.stages, self.losses, self.saved = [], [], [], []

    def on_stage(self, stage, stop=None, **facts): self.stages.append(stage)
    def on_log(self, args, state, control, logs=None, **kwargs): self.losses.append(state.log_history[-1].get("loss"))
    def on_save(self, args, state, control, **kwargs): self.saved.append(f"{args.output_dir} {state.global_step}")
    def on_step_end(self, args, state, control, **kwargs):
        self.steps.append(state.global_step)
        if state.global_step == self.save: control.should_save = True
        if state.global_step == self.step: self.action(control)


def ask_to_stop(control): control.should_training_stop = True


def children(): return psutil.Process().children()


def kill_second(control):
    for child in children():
        if child.environ().get("RANK") == "1": child.kill()


def test_a_run_is_started_watched_stopped_killed_and_resumed(text, tmp_path, alone, monkeypatch):
    "By num_processes, in processes of their own: what is asked here reaches them, what happens there is told here."
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")  # as in a single process of torchrun
    shared, shown = settings(text, tmp_path/"out", num_processes=2, save_steps=100), []
    def say(*told): shown.append(told)
    stopping, dying = Watcher(4, 8, ask_to_stop), Watcher(step=12, action=kill_second)
    with pytest.raises(Interrupted, match="Stopped at step 8 of 20; saved in") as told:
        finetune(**shared | dict(progress=say, callbacks=[stopping]))
    assert told.value.code == 130 and "Run the same again to resume." in str(told.value)
    assert stopping.stages == [LOADING, BEFORE, PROBING, TRAINING] and stopping.steps == list(range(1, 9))
    assert stopping.saved == [f"{tmp_path/'out'} {step}" for step in (4, 8)]
    assert stopping.losses[:8] == pytest.approx([entry["loss"] for entry in alone.losses][:8], rel=1e-5)
    assert ("Fine-tuning", 8, 20) in shown and any(what.startswith("Perplexity of") for what, *_ in shown)
    assert [path.name for path in find_checkpoints(tmp_path/"out")] == ["checkpoint-4", "checkpoint-8"]
    with pytest.raises(RuntimeError, match="Process 1 of 2 was killed .SIGKILL., and the run has ended: the newest"):
        with pytest.warns(UserWarning, match="Resuming at step 8 of 20"): finetune(**shared | dict(callbacks=[dying]))
    assert dying.steps[:4] == [9, 10, 11, 12] and not any("RANK" in child.environ() for child in children())
    same(finetune(**shared | dict(num_processes=1)), alone)


@pytest.fixture
def two(monkeypatch):
    "This process as the first of two, the other of which says `two.other`, or the same."
    heard = SimpleNamespace(other=None)
    def gathered(value): return pickle.loads(pickle.dumps([value, value if heard.other is None else heard.other]))
    for name, value in dict(group="a group", all=2).items(): monkeypatch.setattr(RANKS, name, value)
    for module in (ranks, beginning, probe): monkeypatch.setattr(module, "gathered", gathered)
    return heard


@pytest.mark.parametrize("own", [True, False])
def test_a_divergence_is_one_in_all_processes(two, own):
    wrong = Diverged("The loss became {loss} by step {step}", 1e-4, 5e-4, loss=math.inf, step=7)
    if not own: two.other = wrong
    with pytest.raises(Diverged, match="start again with learning_rate=0.0001") as told:
        with agreed():
            if own: raise wrong
    assert told.value.what == wrong.what == "The loss became inf by step 7" and told.value.shared_by == 2


class Odd(Exception):
    def __init__(self, one, two): super().__init__(f"{one} and {two}")


def test_an_error_that_cannot_be_sent_keeps_its_kind_where_it_was_raised(two):
    with pytest.raises(Odd):
        with agreed(): raise Odd(1, 2)


def follow(**told):
    "launching.follow of two processes that go on, of which one has told something."
    started = SimpleNamespace(all=[SimpleNamespace(poll=lambda: None)] * 2, told=queue.Queue(), pass_on=lambda stop: 0)
    for each in told["told"]: started.told.put(each)
    return launching.follow(started, SimpleNamespace(stop=None, callbacks=()), FinetuneConfig())


def test_an_error_of_a_process_that_the_first_waits_for_ends_a_started_run(monkeypatch):
    monkeypatch.setattr(launching, "GRACE", 0.1)
    with pytest.raises(OSError, match="no disk"): follow(told=[(1, "raised", OSError("no disk"), True)])


def test_a_process_that_stops_as_all_do_leaves_the_first_its_time(monkeypatch):
    monkeypatch.setattr(launching, "GRACE", -1)
    last = [(rank, "ended") for rank in range(2)]
    told = [(1, "raised", Interrupted("Stopped."), False), (0, "gave", 5), *last]
    assert follow(told=told) == 5


@dataclass
class Probed:
    fits: bool = True
    peak_bytes: int = 1
    torch_compile: bool = True
    recipe = SimpleNamespace(micro_batch=1)


@pytest.fixture
def probes(two, monkeypatch):
    "Probes that go well here; in the other process the first one fails with `probes.error`."
    heard = SimpleNamespace(error=None)
    def gathered(value):
        error, heard.error = heard.error, None
        return [value, error or value]
    monkeypatch.setattr(ranks, "gathered", gathered)
    changes = dict(probe=lambda trainer, plan: plan, smaller_micro_batch=lambda *given: None, repeated_blocks=list,
                   compiled=lambda blocks: contextlib.nullcontext())
    for name, value in changes.items(): monkeypatch.setattr(probe, name, value)
    return heard


TRAINER = SimpleNamespace(model=())


def test_a_probe_without_memory_in_one_process_ends_all_alike(probes):
    probes.error = torch.OutOfMemoryError("CUDA out of memory")
    with pytest.raises(torch.OutOfMemoryError) as told: probe.settle(TRAINER, Probed())
    assert told.value.shared_by == 2


def test_what_cannot_be_compiled_in_one_process_is_compiled_in_none(probes):
    probes.error = RuntimeError("Triton Error [CUDA]: no kernel image is available")
    with contextlib.ExitStack() as around, pytest.warns(UserWarning, match="torch.compile failed .Triton Error"):
        assert not probe.settle_compiled(TRAINER, Probed(), around).torch_compile


@pytest.mark.parametrize("copies, each", [(1, 8), (2, 12)], ids=["of one process", "of two"])
def test_a_probe_counts_the_buckets_of_ddp(monkeypatch, copies, each):
    monkeypatch.setattr(RANKS, "all", copies)
    model = torch.nn.Linear(3, 5)
    assert probe.moment_bytes(model, "adamw_torch_fused") == each * 20
    model.reshard = None  # of FSDP, which has no such buckets
    assert probe.moment_bytes(model, "adamw_torch_fused") == 8 * 20


def test_a_pass_that_only_adds_up_draws_no_random_numbers(tmp_path):
    "So that a resumed run, which begins with such passes, has the dropout of one that went through."
    trainer = small_trainer(tmp_path)
    trainer.current_gradient_accumulation_steps = 1
    assert trainer.model.config.resid_pdrop > 0
    before = torch.get_rng_state()
    trainer.add_up(trainer.model, torch.tensor([[1, 2]]))
    assert torch.equal(before, torch.get_rng_state()) and trainer.model.training


def test_a_folder_that_one_process_cannot_write_to_is_told_to_all(two, monkeypatch, tmp_path):
    (tmp_path/"file").touch()
    monkeypatch.setattr(beginning, "check_gpus", lambda used: None)
    with pytest.raises(NotADirectoryError) as told: beginning.check_run(FinetuneConfig(output_dir=str(tmp_path/"file")))
    assert told.value.shared_by == 2


def test_a_number_of_processes_that_differs_is_refused_by_all(two, monkeypatch):
    monkeypatch.setattr(beginning, "expected", lambda: 2)
    with pytest.raises(ValueError, match="num_processes is 3, and WORLD_SIZE says 2") as told:
        beginning.check_run(FinetuneConfig(num_processes=3))
    assert told.value.shared_by == 2


def said_by(monkeypatch, rank, error, group="a group"):
    "On stderr, by a process of that rank of three that ends with `error`."
    for name, value in dict(own=rank * bool(group), group=group).items(): monkeypatch.setattr(RANKS, name, value)
    for name, value in dict(WORLD_SIZE="3", RANK=str(rank)).items(): monkeypatch.setenv(name, value)
    monkeypatch.setattr(sys, "__stderr__", seen := io.StringIO())
    monkeypatch.setattr("colab_gpt2.cli.leave", lambda alone: seen.write(f"waits {'not ' * bool(alone)}long"))
    with contextlib.redirect_stderr(seen): tell_error("colab-gpt2", error)
    return seen.getvalue().splitlines()


def test_who_tells_an_error(monkeypatch):
    shared = ValueError("no")
    shared.shared_by = 3
    def said(error, *options): return [said_by(monkeypatch, rank, error, *options) for rank in range(3)]
    long, short = ["waits long"], "waits not long"
    assert said(shared) == [["colab-gpt2: no", *long], long, long]
    assert said(OSError("no"))[1:] == [[f"colab-gpt2, process {n}: no", short] for n in (1, 2)]
    assert said(OSError("no"), None)[2] == ["colab-gpt2, process 2: no", short]  # before they have met
    assert said(Lost("gone")) == [["colab-gpt2: gone", *long], ["colab-gpt2, process 1: gone", *long], long]
    assert said(Interrupted("Stopped."))[1:] == said(ValueError("typed"), None)[1:] == [long, long]


def relays_to_nobody(folder):
    "As a started process whose starter was killed."
    given, ours = os.pipe()
    os.write(ours, pickle.dumps((FinetuneConfig(), ())))
    os.close(ours)
    nobody, out = os.pipe()
    os.close(nobody)
    os.dup2(given, 0), os.dup2(out, 1)
    sys.stdin = open(0)
    def finetune(config, callbacks, progress):
        progress("Fine-tuning", 1, 2)
        stop = SimpleNamespace(asked=False, ask=lambda code: (folder/"asked").write_text(str(code)))
        callbacks[0].on_stage(TRAINING, stop=stop)
        callbacks[0].answered.wait(10)
        (folder/"saved").touch()
    launching.work(finetune)


def test_a_run_whose_starter_was_killed_stops_and_saves(tmp_path):
    with launched(relays_to_nobody, tmp_path) as process: process.join(30)
    assert process.exitcode == 0, process.done.stderr
    assert (tmp_path/"asked").read_text() == "143" and (tmp_path/"saved").exists()


@pytest.mark.parametrize("gpus, refused", [(1, True), (2, False), (0, False)])
def test_more_processes_than_gpus_are_refused(monkeypatch, gpus, refused):
    class Started(Exception): pass
    def start(*given): raise Started
    monkeypatch.setattr(launching, "find_device", lambda: ("cuda" if gpus else "cpu", ""))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    monkeypatch.setattr(launching, "Started", start)
    said = "There are 2 processes for 1 GPU, and each needs its own"
    with pytest.raises(ValueError if refused else Started, match=said if refused else None):
        launching.launch(FinetuneConfig(num_processes=2), progress=False)


def test_processes_that_share_a_gpu_are_refused_by_all(two, monkeypatch):
    monkeypatch.setattr(beginning, "own_gpu", lambda: "GPU-1")
    with pytest.raises(ValueError, match="for 1 GPU") as told: beginning.meet(FinetuneConfig())
    assert told.value.shared_by == 2


@pytest.mark.parametrize("said, lost", [
    ("NCCL error: invalid usage\nDuplicate GPU detected : rank 0 and rank 1 both on CUDA device 1000", False),
    ("NCCL error: unhandled cuda error, NCCL version 2.21.5\nncclUnhandledCudaError: out of memory", False),
    ("ncclRemoteError: A call failed possibly due to a network error or a remote process exiting prematurely.", True),
    ("[Rank 0] Watchdog caught collective operation timeout: WorkNCCL(SeqNum=7) ran for 1800000 ms", True),
    ("NCCL communicator was aborted on rank 0.", True),
    ("[gloo/transport/tcp/pair.cc:547] Connection closed by peer [127.0.0.1]:4242", True)])
def test_which_errors_say_that_another_process_has_gone(two, said, lost):
    assert ranks.lost_peer(RuntimeError(said)) is lost


def test_a_port_of_a_run_that_has_just_ended_can_be_used():
    with socket.socket() as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        port = listener.getsockname()[1]
        with socket.create_connection(("127.0.0.1", port)):
            listener.accept()[0].close()  # the first to close keeps the port for a minute
    ranks.check_port("127.0.0.1", port)
