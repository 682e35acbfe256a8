"""A LLaMA of 12.5 M parameters, trained on what text there is: what methods of few bits are compared on.

Command:    python -m launch.train --config configs/language/wikitext_small.py --workdir runs/lm \\
              --config.data.path=text.zip
            then python -m launch.convert --run runs/lm --to runs/lm/model, and
            python -m launch.perplexity --model runs/lm/model --data text.zip --files wikitext2/test.txt --context 256
            (":smoke": two steps of a tiny one on made-up sentences)
Hardware:   2 CPU cores that also did other work, 51 min: 1,200 tokens/s, 3.3 M tokens
Data:       wikitext2/valid.txt, read twice, shakespeare/input.txt and essays/*/*.txt in a folder or zip, together 1.1 M
            tokens; WikiText-2's own training split is not there. Neither the tokeniser nor the training sees
            wikitext2/test.txt
Published:  nothing of this size and data; research/language/README.md has our perplexity, 90.6 a token
"""

from configs import common
from research.core.config import parse_arg

FILES = {
    "train": ("wikitext2/valid.txt", "wikitext2/valid.txt", "shakespeare/input.txt", "essays/*/*.txt"),
    "test": ("wikitext2/test.txt",),
}
SIZE = {"hidden_size": 320, "intermediate_size": 864, "num_hidden_layers": 8, "num_attention_heads": 5}
TINY = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}


def get_config(arg: str = ""):
    options = parse_arg(arg, smoke=False)
    c = common.base()
    c.experiment = "research.language.training"
    c.batch_size = 16
    c.epochs = 3.0
    c.data.kind = "text"
    c.data.options = dict(files=FILES, tokenizer="", vocab=4096, context=256)
    c.model = dict(family="llama", dtype="float32", options=SIZE)
    c.eval.every, c.save.every = 1.5, 0.25
    c.log.every = 20
    c.optimizer.lr = 2e-3
    c.optimizer.weight_decay = 0.1
    c.optimizer.clip = 1.0
    c.optimizer.options = dict(b1=0.9, b2=0.95)
    c.schedule.warmup_epochs = 0.2
    c.schedule.warmup_lr = 0.0
    c.schedule.min_lr = 1e-4
    c.schedule.per_step = True
    if options.smoke:
        c = common.smoke(c)
        c.data.kind, c.eval.batch_size = "text", 16
        c.data.options = dict(vocab=300, context=16)
        c.model.options = TINY
    return c
