"Small runs for tests of what is written."
from transformers import GPT2Config, TrainingArguments

from colab_gpt2.engine.trainer import BlockTrainer
from colab_gpt2.model.loading import new_model


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
