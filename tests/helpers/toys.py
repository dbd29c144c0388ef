"Small runs for tests of what is written."
from transformers import GPT2Config, TrainingArguments

from colab_gpt2.config import FinetuneConfig
from colab_gpt2.engine.checkpoints import find_checkpoints, read_manifest
from colab_gpt2.engine.trainer import BlockTrainer
from colab_gpt2.model.loading import load_tokenizer, new_model
from colab_gpt2.resuming import where_to_resume


def small_trainer(folder):
    "A trainer of a model of one layer, whose checkpoints go to `folder`: `save(trainer, step)`."
    shape = GPT2Config(n_layer=1, n_embd=16, n_head=2, n_positions=8, vocab_size=99)
    arguments = TrainingArguments(folder, use_cpu=True, report_to="none")
    trainer = BlockTrainer(new_model(shape, seed=0), args=arguments, train_dataset=[0])
    trainer.create_optimizer_and_scheduler(8)
    return trainer


def save(trainer, step):
    trainer.state.global_step = step
    trainer._save_checkpoint(trainer.model, None)


def newest(folder):
    "The checkpoint from which the run in `folder` resumes, or None; with the warnings."
    run = next((read_manifest(path)["run"] for path in find_checkpoints(folder)), {})
    found = where_to_resume(FinetuneConfig(output_dir=str(folder)), run)
    return found and found.path


NO_DROPOUT = dict(resid_pdrop=0., embd_pdrop=0., attn_pdrop=0.)


def write_toy(folder, shape):
    "`folder` with random weights for a config, and tiny's tokenizer."
    new_model(shape, seed=0).save_pretrained(folder)
    load_tokenizer("tiny").save_pretrained(folder)


def write_tide(folder, articles, **shape):
    "`folder` with train.txt of so many `articles`, eval.txt, and `toy`, a GPT-2 of that shape with tiny's tokenizer."
    for name, word, count in (("train", "day", articles), ("eval", "night", 13)):
        def article(i):
            return f" = Article {i} = \n \n The tide of {word} {i} came in at {i % 12} o'clock and went out again . \n"
        (folder/f"{name}.txt").write_text("".join(map(article, range(count))))
    write_toy(folder/"toy", GPT2Config(vocab_size=8192, **shape, **NO_DROPOUT))
    return folder
