"""Distil a teacher into a smaller student: one flat script from two models to a trained one.

    python examples/distill_minimal.py      # SmolLM2-135M into 24 of its own 30 layers, on the CPU
    python examples/distill_minimal.py --teacher DIR --student DIR --prompts my.jsonl --steps 100 --out my-student

The teacher answers every prompt once. The student learns to predict each token of the answers as the teacher does: the
loss is the sum over the answers' tokens of KL(teacher || student), divided by the number of these tokens.
`limbeck run forward-kl` does it with checkpoints, controls, an evaluation and a report.
Shapes: B rows, T positions, N answer tokens of a batch, D hidden width, V vocabulary.
"""

import argparse
from itertools import chain, count
from pathlib import Path

import torch

import limbeck
from limbeck.data.batches import Row, make_batch, steps_of_epoch
from limbeck.elicit.prompts import load_prompts
from limbeck.models.compatibility import check_same_vocabulary
from limbeck.models.folder import save_model
from limbeck.models.generate import GenerationJob, generate
from limbeck.models.load import load_model, load_tokenizer
from limbeck.models.model import head_of, hidden_states
from limbeck.models.prune import Calibration, choose_layers, drop_layers
from limbeck.types import Sampling

PROMPTS, HELD_OUT = 152, 8  # how many are read, and how many of them are measured on instead of trained on
MAX_TOKENS, TOKENS_PER_STEP = 80, 512  # of an answer, and (about) of the answers in one step
LR, WARMUP_STEPS, MAX_NORM = 2e-4, 5, 1.0
SEED = 7


def write_answers(model, prompts):
    """A sampled answer to each prompt, as rows of token ids. The ids that were drawn are the ids that are trained."""
    prompt_ids = [model.prompt_ids(prompt.messages) for prompt in prompts]
    sampling = Sampling(temperature=1.0, max_tokens=MAX_TOKENS)
    jobs = [GenerationJob(ids, sampling, SEED + number) for number, ids in enumerate(prompt_ids)]
    answers = dict(generate(model.net, jobs, model.eos_ids, vocab_size=model.vocab_size))  # in the order they finish
    return [Row(prompts[n].id, tuple(prompt_ids[n]), tuple(answers[n])) for n in range(len(prompts))]


def answer_logits(net, batch, vocab_size):
    """Logits [N, V] that predict the answers' tokens. Prompts and padding are never projected."""
    hidden_BTD = hidden_states(net, batch.tokens_BT)
    return head_of(net).cut(vocab_size).logits(hidden_BTD[batch.response_positions()])


def kl_sum(teacher, net, batch):
    """KL(teacher || student) in nats, summed over the batch's answer tokens.

    A micro-batch has at most 1,024 tokens, so its logits fit. `limbeck.objectives.head.fused_loss` gives the same
    numbers and gradients faster, a chunk at a time, without ever holding [N, V].
    """
    with torch.no_grad():
        teacher_NV = answer_logits(teacher.net, batch, teacher.vocab_size)
    student_NV = answer_logits(net, batch, teacher.vocab_size)
    return limbeck.divergence("forward_kl", teacher_NV, student_NV).sum()  # or "reverse_kl", "jsd", ...


@torch.no_grad()
def mean_kl(teacher, net, rows):
    """The same per token over all rows, without a gradient."""
    return sum(kl_sum(teacher, net, make_batch([row])).item() for row in rows) / sum(len(r.response_ids) for r in rows)


def main(argv=None):
    parser = argparse.ArgumentParser(description="Distil a teacher into a student by forward KL.")
    parser.add_argument("--teacher", default="smollm2-135m-instruct", help="a name of `limbeck models`, or a folder")
    parser.add_argument("--student", help="as --teacher, with the same tokens (default: the teacher less some layers)")
    parser.add_argument("--prompts", default="builtin/everyday", help="builtin/NAME, or a JSONL file with `prompt`")
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--out", type=Path, default=Path("runs/distill_minimal"))
    args = parser.parse_args(argv)

    # 1. Text: the teacher writes it, once.
    teacher = load_model(args.teacher)
    check_same_vocabulary(teacher.tokenizer, load_tokenizer(args.student or args.teacher))
    rows = write_answers(teacher, load_prompts(args.prompts)[:PROMPTS])
    held_out, rows = rows[:HELD_OUT], rows[HELD_OUT:]

    # 2. Student: a model of its own, or the teacher without the fifth of its layers whose loss costs the least KL.
    net = load_model(args.student or args.teacher).net
    if args.student is None:
        batch = make_batch(rows[:3])
        calibration = Calibration(batch.tokens_BT, positions_BT=batch.mask_BT.roll(-1, dims=1))
        layers = len(net.get_decoder().layers) * 4 // 5
        net = drop_layers(net, choose_layers(net, "importance", layers, lambda: calibration).kept)
    net.get_input_embeddings().padding_idx = None  # padding is often the end token, whose embedding has to learn, too
    before = mean_kl(teacher, net, held_out)

    # 3. Training: a step is a few micro-batches, divided once by the number of all their answer tokens.
    optimizer = torch.optim.AdamW(net.parameters(), betas=(0.9, 0.98), weight_decay=0.0)
    batches_of_steps = chain.from_iterable(steps_of_epoch(rows, SEED, epoch, TOKENS_PER_STEP) for epoch in count())
    losses = [0.0] * args.steps
    net.train()
    for step, micro_batches in zip(range(args.steps), batches_of_steps, strict=False):
        batches = [make_batch(rows, micro_batch) for micro_batch in micro_batches]
        tokens = sum(int(batch.mask_BT.sum()) for batch in batches)
        for batch in batches:
            loss = kl_sum(teacher, net, batch) / tokens
            loss.backward()
            losses[step] += loss.item()
        norm = torch.nn.utils.clip_grad_norm_(net.parameters(), MAX_NORM, error_if_nonfinite=True)
        for group in optimizer.param_groups:
            group["lr"] = LR * min((step + 1) / WARMUP_STEPS, 1 - step / args.steps)  # up, then down to 0
        optimizer.step()
        optimizer.zero_grad()
        print(f"step {step + 1}/{args.steps}  loss {losses[step]:.4f}  gradient norm {norm:.2f}  tokens {tokens}")

    # 4. Result: the difference it made, and a folder that AutoModelForCausalLM loads.
    net.eval()
    print(f"held-out forward KL, nats per token: {before:.4f} before, {mean_kl(teacher, net, held_out):.4f} after")
    save_model(net, teacher.tokenizer, args.out)
    return losses


if __name__ == "__main__":
    main()
