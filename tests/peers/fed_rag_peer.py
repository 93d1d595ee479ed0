"""The peer of `launch/bench.py` that people would install: fed-rag as it ships, on the same records.

    PYTHON_WITH_FED_RAG tests/peers/fed_rag_peer.py job.json

The protocol is protocol.py's. `score` is its `compute_target_sequence_proba`, one passage at a time; `embed` its retriever's
`encode_context`; `lm_ft` its `HuggingFaceTrainerForRALT`. The prompts are given as texts, for it tokenizes itself.

Read in fed-rag 0.0.27. There is no `lsr_ft`: `DataCollatorForLSR` makes the retriever's scores a new tensor (`torch.tensor([n.score …],
requires_grad=True)`), so that no gradient reaches the encoder, and it lacks the fields that sentence-transformers 6.2 asks of a collator.
There is no `generate`: `RAGSystem.query` joins all passages to one context (`_format_context`).
"""

from __future__ import annotations

import contextlib
import math
import sys
import tempfile

import torch
from torch_peer import serve


def score(job: dict):
    """log of the probability that it gives each target after its prompt. Models are loaded in the precision that is asked for."""
    from fed_rag.generators.huggingface import HFPretrainedModelGenerator

    generator = HFPretrainedModelGenerator(job["model"], load_model_kwargs={"dtype": getattr(torch, job["dtype"])})
    generator.model.eval()

    def run():
        logp = []
        for prompt, target in job["texts"]:
            probability = float(generator.compute_target_sequence_proba(prompt, target))
            logp.append(math.log(max(probability, 1e-38)))
        return logp

    return run


def embed(job: dict):
    """Vectors of the texts."""
    from fed_rag.retrievers.huggingface import HFSentenceTransformerRetriever

    retriever = HFSentenceTransformerRetriever(model_name=job["model"])
    return lambda: retriever.encode_context(job["texts"]).tolist()


def lm_ft(job: dict):
    """Once through the given instances; the loss of each step. Its unit is an example with all its passages.

    So a step has as many examples as make about the number of steps wanted, one at a time, for it pads to the longest. The text is that of
    the job: its trainer would take its own template, which is longer.
    """
    from datasets import Dataset
    from fed_rag import NoEncodeRAGSystem, RAGConfig
    from fed_rag.data_collators.huggingface import DataCollatorForRALT
    from fed_rag.generators.huggingface import HFPretrainedModelGenerator
    from fed_rag.trainers.huggingface import HuggingFaceTrainerForRALT
    from transformers import TrainingArguments

    examples, o = job["examples"], job["optimizer"]
    generator = HFPretrainedModelGenerator(job["model"], load_model_kwargs={"dtype": torch.float32})
    most = max(len(example["passages"]) for example in examples)
    system = NoEncodeRAGSystem(generator=generator, knowledge_store=given(examples), rag_config=RAGConfig(top_k=most))
    folder = tempfile.TemporaryDirectory()
    arguments = TrainingArguments(
        output_dir=folder.name,
        num_train_epochs=1,
        per_device_train_batch_size=1,
        gradient_accumulation_steps=math.ceil(len(examples) / len(job["steps"])),
        learning_rate=o["lr"],
        lr_scheduler_type="constant",
        adam_beta1=o["b1"],
        adam_beta2=o["b2"],
        adam_epsilon=o["eps"],
        weight_decay=o["weight_decay"],
        max_grad_norm=o["clip_norm"],
        bf16=job["dtype"] == "bfloat16",
        use_cpu=True,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )
    asked = Dataset.from_list([{key: example[key] for key in ("query", "response")} for example in examples])
    trainer = HuggingFaceTrainerForRALT(rag_system=system, train_dataset=asked, training_arguments=arguments)
    trainer.hf_trainer_obj.data_collator = DataCollatorForRALT(rag_system=system, example_template=job["template"])

    def run(folder=folder):  # which is there as long as this is
        with contextlib.redirect_stdout(sys.stderr):  # the trainer prints what it logs
            trainer.train()
        return [entry["loss"] for entry in trainer.hf_trainer_obj.state.log_history if "loss" in entry]

    return run


def given(examples: list[dict]):
    """A knowledge store from which each example gets the passages that it was given: retrieval is no part of the work."""
    from fed_rag.base.no_encode_knowledge_store import BaseNoEncodeKnowledgeStore
    from fed_rag.data_structures import KnowledgeNode

    nodes = {
        example["query"]: [(1.0, KnowledgeNode(node_type="text", text_content=text)) for text in example["passages"]]
        for example in examples
    }

    class Given(BaseNoEncodeKnowledgeStore):
        def retrieve(self, query, top_k):
            return nodes[query][:top_k]

        def batch_retrieve(self, queries, top_k):
            return [self.retrieve(query, top_k) for query in queries]

        @property
        def count(self):
            return len(nodes)

        def load_node(self, node): ...

        load_nodes = delete_node = load_node

        def clear(self): ...

        persist = load = clear

    return Given()


KINDS = {"embed": embed, "score": score, "lm_ft": lm_ft}

if __name__ == "__main__":
    serve(sys.argv[1], KINDS)
