"That the training options of transformers and peft act here as they act there."
import copy, re

import pytest
import torch
from helpers.toys import small_trainer
from peft import PeftModel
from transformers import GPT2Config, LlamaConfig, Trainer, TrainingArguments, default_data_collator, get_scheduler

from colab_gpt2.config import LENGTHENED, SCHEDULES, FinetuneConfig
from colab_gpt2.engine.probe import moment_bytes
from colab_gpt2.engine.trainer import make_trainer
from colab_gpt2.model.lora import adapters_of, add_adapters, merge_adapters
from colab_gpt2.model.loading import new_model
from colab_gpt2.planning.memory import Recipe, shape_of, step_memory
from colab_gpt2.planning.plan import TextSize, named_runtime, plan_run
from colab_gpt2.training import finetune

SMALL = dict(vocab_size=203, n_layer=2, n_embd=32, n_head=2, n_positions=32, resid_pdrop=0.,
             embd_pdrop=0., attn_pdrop=0.)
GPT2 = GPT2Config(**SMALL)
LLAMA = LlamaConfig(vocab_size=203, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2,
                    max_position_embeddings=32)


class Rows(list):
    "Made blocks."
    block_size, tokens = 32, 8 * 32


def rows():
    torch.manual_seed(0)
    ids = [torch.randint(203, (32,)) for _ in range(8)]
    def labels(n, i): return torch.where(torch.arange(32) % 5 == n % 5, -100, i)
    return Rows(dict(input_ids=i, labels=labels(n, i)) for n, i in enumerate(ids))


def ours(folder, model, **changes):
    config = FinetuneConfig(output_dir=str(folder), learning_rate=1e-3, precision="fp32", **changes)
    plan = plan_run(model.config, TextSize(10_000, 32, "made up"), named_runtime("CPU"), config)
    trainer = make_trainer(config, model, None, rows(), plan)
    trainer.current_gradient_accumulation_steps = 1  # as train() sets it
    return trainer


def step(trainer, collated):
    "Loss and gradients of a step."
    trainer.model.zero_grad()
    loss = trainer.training_step(trainer.model, dict(collated))
    return loss.item(), [p.grad.clone() for p in trainer.model.parameters() if p.grad is not None]


@pytest.mark.parametrize("method", ["full", "lora"])
@pytest.mark.parametrize("config", [GPT2, LLAMA], ids=["gpt2", "llama"])
def test_label_smoothing_gives_the_stock_trainers_loss_without_its_logits(tmp_path, config, method):
    model, collated = new_model(config, seed=0), default_data_collator(rows()[:4])
    collated["labels"][:] = collated["labels"].where(torch.arange(32) != 3, -100)
    same = copy.deepcopy(model) if method == "full" else add_adapters(copy.deepcopy(model), 16, seed=42)
    trainer = ours(tmp_path, model, method=method, trainer_args=dict(label_smoothing_factor=0.3))
    trainer.micro_batch = 4
    stock = Trainer(same, TrainingArguments(tmp_path, use_cpu=True, report_to="none", label_smoothing_factor=0.3))
    stock.current_gradient_accumulation_steps = 1
    assert trainer.label_smoother is None and stock.label_smoother
    (loss, gradients), (expected, theirs) = step(trainer, collated), step(stock, collated)
    assert loss == pytest.approx(expected, rel=1e-6) and len(gradients) == len(theirs)
    for a, b in zip(gradients, theirs): torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_label_smoothing_of_a_model_that_is_not_tuned_is_the_trainers_own(tmp_path):
    collated = default_data_collator(rows()[:4])
    found = [step(ours(tmp_path, new_model(GPT2, seed=0), method="full", tune=tune,
                       trainer_args=dict(label_smoothing_factor=0.3)), collated)[0] for tune in (True, False)]
    assert found[0] == pytest.approx(found[1], rel=1e-6)


@pytest.mark.parametrize("method", ["full", "lora"])
def test_neftune_adds_the_stock_trainers_noise_while_it_trains_and_is_gone_afterwards(tmp_path, method):
    model, heard = new_model(GPT2, seed=0), []
    trainer = ours(tmp_path, model, method=method, max_steps=2, save_steps=-1,
                   trainer_args=dict(neftune_noise_alpha=5.0))
    embedding = model.get_input_embeddings()
    def hear(module, given, made):
        torch.manual_seed(len(heard))  # before the noise is drawn
        heard.append((torch.nn.functional.embedding(given[0], module.weight), made, module.training))
    noisy = []
    embedding.register_forward_hook(hear)
    model.transformer.drop.register_forward_hook(lambda module, given, made: noisy.append(given[0].detach()))
    positions = model.transformer.wpe.weight.detach().clone()
    trainer.train()
    assert len(embedding._forward_hooks) == 1 and not hasattr(embedding, "neftune_noise_alpha")
    exact, _, training = heard[0]
    noise, bound = noisy[0] - positions - exact, 5.0 / (32 * 32) ** 0.5
    assert training and 0.9 * bound < noise.abs().max() <= bound * 1.001


NEEDED = dict(cosine_with_min_lr=dict(min_lr_rate=0.1), cosine_warmup_with_min_lr=dict(min_lr_rate=0.1),
              warmup_stable_decay=dict(num_decay_steps=4), cosine_with_restarts=dict(num_cycles=2),
              polynomial=dict(power=2.0), inverse_sqrt=dict(timescale=5))

@pytest.mark.parametrize("name", SCHEDULES)
def test_the_rates_of_a_schedule_are_transformers_own(tmp_path, name):
    trainer = ours(tmp_path, new_model(GPT2, seed=0), lr_scheduler_type=name, warmup_steps=3,
                   trainer_args=dict(lr_scheduler_kwargs=NEEDED.get(name, {})))
    trainer.create_optimizer_and_scheduler(12)
    optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))], lr=1e-3)
    schedule, found = get_scheduler(name, optimizer, 3, 12, scheduler_specific_kwargs=NEEDED.get(name)), []
    for _ in range(12):
        found.append((trainer.lr_scheduler.get_last_lr()[0], schedule.get_last_lr()[0]))
        optimizer.step(), schedule.step(), trainer.optimizer.step(), trainer.lr_scheduler.step()
    assert all(a == b for a, b in found) and len({a for a, _ in found}) >= (1 if name == "constant" else 3)


@pytest.mark.parametrize("name", [name for name in SCHEDULES if name.endswith("min_lr")])
def test_a_schedule_to_a_least_rate_ends_at_a_tenth_where_none_is_set(tmp_path, name):
    trainer = ours(tmp_path, new_model(GPT2, seed=0), lr_scheduler_type=name)
    trainer.create_optimizer_and_scheduler(12)
    for _ in range(12): trainer.optimizer.step(), trainer.lr_scheduler.step()
    assert trainer.lr_scheduler.get_last_lr()[0] == pytest.approx(1e-4, rel=0.2)


@pytest.mark.parametrize("name", ["greedy", "reduce_lr_on_plateau", "warmup_stable"])
def test_a_schedule_that_waits_for_an_evaluation_is_refused(name):
    with pytest.raises(ValueError, match=f"lr_scheduler_type is '{name}'"): FinetuneConfig(lr_scheduler_type=name)
    with pytest.raises(ValueError, match="set lr_scheduler_type instead"):
        finetune(model="tiny", trainer_args=dict(lr_scheduler_type=name), progress=False)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("options")
    line = "The tide of day came in at nine o'clock and went out again . \n"
    (folder/"train.txt").write_text(line * 90)
    (folder/"eval.txt").write_text(line * 9)
    from colab_gpt2.model.loading import load_tokenizer
    new_model(GPT2Config(**{**SMALL, "vocab_size": 8192, "resid_pdrop": 0.1}), seed=0).save_pretrained(folder/"toy")
    load_tokenizer("tiny").save_pretrained(folder/"toy")
    def run(output_dir, **changes):
        options = dict(model=str(folder/"toy"), block_size=32, prompt="The", max_new_tokens=2, precision="fp32",
                       learning_rate=1e-3, train_file=str(folder/"train.txt"), eval_file=str(folder/"eval.txt"),
                       cache_dir=str(folder/"cache"), output_dir=str(output_dir), eval_steps=-1, progress=False)
        return finetune(**{**options, **changes})
    return run


def test_a_run_is_lengthened_from_where_its_rate_was_still_high(run, tmp_path):
    "With as many steps of warm-up, the weights are those of a run that was so long from the beginning."
    same = dict(lr_scheduler_type=LENGTHENED, warmup_steps=2,
                trainer_args=dict(lr_scheduler_kwargs=dict(num_decay_steps=3)))
    short = run(tmp_path/"out", max_steps=9, save_steps=8, **same)
    longer = run(tmp_path/"out", max_steps=14, resume=str(tmp_path/"out"), **same)
    once = run(tmp_path/"once", max_steps=14, **same)
    assert longer.resumed_from.endswith("checkpoint-6") and (short.steps, longer.steps) == (9, 14)
    assert longer.files["model.safetensors"] == once.files["model.safetensors"]


HOW = [dict(), dict(use_rslora=True), dict(use_dora=True), dict(target_modules="some")]

@pytest.mark.parametrize("how", HOW, ids=str)
@pytest.mark.parametrize("config, some", [(GPT2, "c_attn"), (LLAMA, "q_proj, v_proj")], ids=["gpt2", "llama"])
def test_adapters_of_every_kind_are_counted_merged_and_kept_without_a_change(config, some, how, tmp_path):
    how = {name: some if name == "target_modules" else given for name, given in how.items()}
    adapted = add_adapters(new_model(config, seed=0), 4, **how)
    trained, ids = [p for p in adapted.parameters() if p.requires_grad], rows()[0]["input_ids"][None]
    optimizer = torch.optim.AdamW(trained, lr=1e-2)
    for _ in range(3):
        adapted(input_ids=ids, labels=ids).loss.backward()
        optimizer.step(), optimizer.zero_grad()
    with torch.no_grad(): learnt = adapted.eval()(input_ids=ids).logits
    write = adapters_of(adapted, "base")
    merged = merge_adapters(adapted, lambda: new_model(config, seed=0))
    write(tmp_path/"adapters")
    kept = PeftModel.from_pretrained(new_model(config, seed=0), tmp_path/"adapters").eval()
    for model in merged, kept:
        torch.testing.assert_close(model(input_ids=ids).logits, learnt, atol=1e-5, rtol=1e-5)
    counted = {k: v for k, v in how.items() if k != "use_rslora"}
    recipe = Recipe(2, 32, method="lora", lora_rank=4, device="cpu", **counted)
    assert step_memory(shape_of(config), recipe).trained == sum(p.numel() for p in trained)


@pytest.mark.parametrize("config", [GPT2, LLAMA], ids=["gpt2", "llama"])
def test_adapters_learn_beside_weights_in_4_bits_and_are_merged_into_whole_ones(config, tmp_path):
    adapted = add_adapters(new_model(config, seed=0), 4, load_in_4bit=True)
    trained, ids = [p for p in adapted.parameters() if p.requires_grad], rows()[0]["input_ids"][None]
    optimizer, losses = torch.optim.AdamW(trained, lr=1e-2), []
    for _ in range(5):
        losses.append(adapted(input_ids=ids, labels=ids).loss)
        losses[-1].backward(), optimizer.step(), optimizer.zero_grad()
    assert losses[-1] < losses[0] - 0.1 and {p.dtype for p in trained} == {torch.float32}
    deep = next(m for m in adapted.modules() if hasattr(m, "quant_state"))
    deep.compute_dtype = torch.bfloat16
    assert deep(torch.ones(1, deep.in_features)).dtype == torch.bfloat16  # as a Linear's inside autocast
    deep.compute_dtype = torch.float32
    packed = [p.quant_state for p in adapted.parameters() if p.dtype == torch.uint8]
    held = sum(p.nbytes for p in adapted.parameters()) + sum(q.absmax.nbytes + q.state2.absmax.nbytes for q in packed)
    largest = 4 * max(q.shape.numel() for q in packed)  # which a product makes in full
    recipe = Recipe(2, 32, method="lora", lora_rank=4, device="cpu", load_in_4bit=True)
    memory = step_memory(shape_of(config), recipe)
    assert memory.moments[next(iter(memory.moments))]["weights"] == pytest.approx(held + largest, rel=0.01)
    with torch.no_grad(): learnt = adapted.eval()(input_ids=ids).logits
    adapters_of(adapted, "base")(tmp_path/"adapters")
    merged = merge_adapters(adapted, lambda: new_model(config, seed=0))
    kept = PeftModel.from_pretrained(new_model(config, seed=0), tmp_path/"adapters").eval()
    torch.testing.assert_close(merged(input_ids=ids).logits, kept(input_ids=ids).logits, atol=1e-5, rtol=1e-5)
    assert 0 < (merged(input_ids=ids).logits - learnt).norm() < 0.2 * learnt.norm()  # what 4 bits have rounded


def test_adamw_in_8_bits_holds_as_many_bytes_as_the_plan_says(tmp_path):
    model = new_model(GPT2Config(**SMALL | dict(n_embd=128)), seed=0)
    trainer = ours(tmp_path, model, method="full", optim="adamw_bnb_8bit", max_steps=1, save_steps=-1)
    trainer.train()
    moments = [t for state in trainer.optimizer.state.values() for name, t in state.items()
               if name.startswith(("state", "absmax"))]
    assert {t.dtype for t in moments} == {torch.uint8, torch.float32}
    assert sum(t.nbytes for t in moments) == pytest.approx(moment_bytes(model, "adamw_bnb_8bit"), rel=0.05)  # biases: 8
    resident = step_memory(shape_of(model), trainer.recipe).resident
    assert resident["optimizer moments"] == pytest.approx(moment_bytes(model, "adamw_bnb_8bit"), rel=0.01)


def test_a_layer_that_is_not_there_is_refused_with_those_that_are():
    with pytest.raises(ValueError, match="has 'q_proj'; the model's layers are wte, wpe, c_attn, c_proj, c_fc"):
        plan_run(new_model(GPT2, seed=0), TextSize(10_000, 32, "made up"), named_runtime("CPU"),
                 FinetuneConfig(target_modules="c_attn,q_proj"))


def test_a_keyword_that_is_not_known_is_told_with_what_is():
    from colab_gpt2 import generate
    for call, said in ((lambda: FinetuneConfig(modle="tiny"), "FinetuneConfig has no 'modle'. Did you mean 'model'?"),
                       (lambda: generate("tiny", num_beams=4), "generate has no 'num_beams'. Known: chat, tokenizer, "),
                       (lambda: generate("tiny", temprature=1), "Did you mean 'temperature'?")):
        with pytest.raises(TypeError, match=re.escape(said)): call()
