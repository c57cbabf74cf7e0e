"""Distil on-policy in one flat script: the student writes, the teacher's distribution stands beside, the student steps.

    python examples/distill_minimal.py            # first make a student that can write
    python examples/on_policy_minimal.py          # then teach it on its own text
    python examples/on_policy_minimal.py --teacher DIR --student DIR --prompts my.jsonl --steps 100 --out my-student

Every step samples new answers from the student as it is now. With p the teacher and q the student:

    loss = sum over the answers' tokens of JSD(p, q) / number of these tokens
    JSD  = b KL(p || m) + (1 - b) KL(q || m),  m = b p + (1 - b) q,  b = 1/2

No gradient flows through the sampling (GKD, arXiv:2306.13649). `limbeck run gkd` mixes in the teacher's text.
Shapes: B rows, T positions, N answer tokens of a batch, D hidden width.
"""

import argparse
import random
from pathlib import Path

import torch

from limbeck.data.batches import Row, make_batch
from limbeck.elicit.prompts import load_prompts
from limbeck.models.compatibility import check_same_vocabulary
from limbeck.models.folder import save_model
from limbeck.models.generate import GenerationJob, generate
from limbeck.models.load import load_model
from limbeck.models.model import head_of, hidden_states
from limbeck.objectives.head import PositionEvidence, fused_loss
from limbeck.objectives.term import make_term
from limbeck.signals.dense import DenseSignal
from limbeck.types import Sampling

HELD_OUT, PROMPTS_PER_STEP = 8, 8  # the first are measured on instead of trained on
MAX_TOKENS = 80
LR, WARMUP_STEPS, MAX_NORM = 1e-4, 5, 1.0
SEED = 7
LOSS = make_term("jsd", {"teacher_share": 0.5})  # or make_term("reverse_kl", {}), ... see docs/objectives.md


def write_answers(model, prompts, seed):
    """The model's answers at temperature 1. The ids that were drawn are the ids that are trained."""
    prompt_ids = [model.prompt_ids(prompt.messages) for prompt in prompts]
    sampling = Sampling(temperature=1.0, max_tokens=MAX_TOKENS)
    jobs = [GenerationJob(ids, sampling, seed + number) for number, ids in enumerate(prompt_ids)]
    answers = dict(generate(model.net, jobs, model.eos_ids, vocab_size=model.vocab_size))  # in the order they finish
    return [Row(prompts[n].id, tuple(prompt_ids[n]), tuple(answers[n])) for n in range(len(prompts))]


def mean_loss(teacher, net, rows):
    """LOSS per answer token, by the chunked head: `fused_loss` makes the logits a chunk at a time, never all at once.

    distill_minimal.py has the plain version: logits and `limbeck.divergence`.
    """
    batch = make_batch(rows)
    row_N, position_N = batch.response_positions()  # of the states that predict the answers' tokens
    with torch.no_grad():
        teacher_ND = hidden_states(teacher.net, batch.tokens_BT)[row_N, position_N]
    signal = DenseSignal(teacher_ND, head_of(teacher.net).cut(teacher.vocab_size))
    return fused_loss(
        hidden_states(net, batch.tokens_BT)[row_N, position_N],
        head_of(net).cut(teacher.vocab_size),
        terms=[LOSS.at_step(0.0, {})],
        scales=[1 / len(row_N)],
        weight_KN=torch.ones(1, len(row_N)),  # one loss, every token counts once
        evidence=PositionEvidence(batch.tokens_BT[row_N, position_N + 1], signal),
    ).loss


def main(argv=None):
    parser = argparse.ArgumentParser(description="Distil a teacher into a student on the student's own text.")
    parser.add_argument("--teacher", default="smollm2-135m-instruct", help="a name of `limbeck models`, or a folder")
    parser.add_argument("--student", default="runs/distill_minimal", help="as --teacher; it must have the same tokens")
    parser.add_argument("--prompts", default="builtin/everyday", help="builtin/NAME, or a JSONL file with `prompt`")
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--out", type=Path, default=Path("runs/on_policy_minimal"))
    args = parser.parse_args(argv)

    # 1. Two models of one vocabulary, and prompts. There is no text yet.
    teacher, student = load_model(args.teacher), load_model(args.student)
    check_same_vocabulary(teacher.tokenizer, student.tokenizer)
    net = student.net
    net.get_input_embeddings().padding_idx = None  # padding is often the end token, whose embedding has to learn, too
    prompts = load_prompts(args.prompts)
    random.Random(SEED).shuffle(prompts)  # noqa: S311 (an order, not a secret)
    held_out, prompts = prompts[:HELD_OUT], prompts[HELD_OUT:]
    with torch.no_grad():
        before = float(mean_loss(teacher, net, write_answers(student, held_out, SEED)))

    # 2. Training: text that is written, read once and thrown away.
    optimizer = torch.optim.AdamW(net.parameters(), betas=(0.9, 0.98), weight_decay=0.0)
    losses = []
    for step in range(args.steps):
        first = step * PROMPTS_PER_STEP
        chosen = [prompts[n % len(prompts)] for n in range(first, first + PROMPTS_PER_STEP)]
        rows = write_answers(student, chosen, SEED + first)
        net.train()
        loss = mean_loss(teacher, net, rows)
        loss.backward()
        net.eval()
        losses.append(loss.item())
        norm = torch.nn.utils.clip_grad_norm_(net.parameters(), MAX_NORM, error_if_nonfinite=True)
        for group in optimizer.param_groups:
            group["lr"] = LR * min((step + 1) / WARMUP_STEPS, 1 - step / args.steps)  # up, then down to 0
        optimizer.step()
        optimizer.zero_grad()
        tokens = sum(len(row.response_ids) for row in rows)
        print(f"step {step + 1}/{args.steps}  loss {losses[-1]:.4f}  gradient norm {norm:.2f}  tokens {tokens}")

    # 3. Result: the loss on what the student now writes to held-out prompts, and a folder that transformers loads.
    with torch.no_grad():
        after = float(mean_loss(teacher, net, write_answers(student, held_out, SEED)))
    print(f"loss on the student's own text to held-out prompts: {before:.4f} before, {after:.4f} after")
    args.out.mkdir(parents=True, exist_ok=True)
    save_model(net, student.tokenizer, args.out)
    return losses


if __name__ == "__main__":
    main()
