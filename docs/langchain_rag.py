"""An exported pair in LangChain: python docs/langchain_rag.py MODELS CORPUS.jsonl "question" …   (docs/integrations.md)"""

import json
import math
import sys
from collections import defaultdict

from langchain_core.embeddings import Embeddings
from langchain_core.vectorstores import InMemoryVectorStore
from langchain_huggingface import HuggingFacePipeline
from sentence_transformers import SentenceTransformer

SCORE_SCALE, K = 20, 3  # retriever.score_scale and evaluate.k of the run


class Pair(Embeddings):
    def __init__(self, folder: str):
        self.query, self.document = (SentenceTransformer(f"{folder}/{side}_encoder") for side in ("query", "document"))

    def embed_documents(self, texts: list[str]) -> list[list[float]]:
        return self.document.encode(texts).tolist()

    def embed_query(self, text: str) -> list[float]:
        return self.query.encode(text).tolist()


models, corpus, *questions = sys.argv[1:]
records = [json.loads(line) for line in open(corpus, encoding="utf-8")]
store = InMemoryVectorStore.from_texts([f"{record['title']}. {record['text']}" for record in records], Pair(models))
how = {"max_new_tokens": 16, "do_sample": False, "return_full_text": False}
lm = HuggingFacePipeline.from_model_id(f"{models}/lm", task="text-generation", pipeline_kwargs=how)
for question in questions:
    weights = defaultdict(float)
    for passage, score in store.similarity_search_with_score(question, k=K):
        answer = lm.invoke(f"Background: {passage.page_content}\n\nQ: {question}\nA:").split("\n")[0].strip()
        weights[answer] += math.exp(SCORE_SCALE * score)  # passages that answer alike add up
    best = max(weights, key=weights.get)
    print(f"{question} {best} ({weights[best] / sum(weights.values()):.2f} of the weight)")
