"""The invented encyclopedia: unique names, verbatim answers, disjoint splits, held-out wordings, a stream of (seed, i) alone."""

from __future__ import annotations

import collections
import hashlib
import itertools
import math
import re
import string
import tracemalloc

import pytest

from radit_jax.data import invented, invented_words
from radit_jax.data.invented import CAPACITY, SPLITS, Invented
from radit_jax.data.invented_relations import KINDS, RELATIONS
from radit_jax.errors import InputError

SIZE = 3400  # a hundred blocks


@pytest.fixture(scope="module")
def data() -> Invented:
    return Invented(SIZE)


@pytest.fixture(scope="module")
def passages(data):
    return {passage.id: passage for passage in data.corpus()}


@pytest.fixture(scope="module")
def questions(data):
    return {split: list(data.questions(split, data.count(split))) for split in SPLITS}


def fact(question) -> tuple[str, str]:
    """(gold id, relation) of a question, from its id."""
    gold_id, relation, _ = question.id.rsplit("-", 2)
    return gold_id, relation


def test_there_is_enough_variety():
    assert len(KINDS) >= 6
    assert len(RELATIONS) >= 25
    assert {relation for kind in KINDS.values() for section in kind.sections for relation in section} == set(RELATIONS)
    for relation in RELATIONS.values():
        assert len(set(relation.states)) >= 4
        assert len({*relation.asks, *relation.asks_held_out}) >= 4
        assert not set(relation.asks) & set(relation.asks_held_out)


@pytest.mark.parametrize("name", RELATIONS)
def test_placeholders_of_wordings(name):
    def fields(text):
        return [field for _, field, _, _ in string.Formatter().parse(text) if field]

    for text in RELATIONS[name].states:
        assert len(fields(text)) == 2 and fields(text).count("a") == 1
        assert set(fields(text)) <= {"S", "s", "o", "P", "p", "a"}
        opener = text.startswith(("{S}", "{P}"))
        assert opener == bool({"S", "P"} & set(fields(text)))  # capitals stand at the start and nowhere else
    for text in (*RELATIONS[name].asks, *RELATIONS[name].asks_held_out):
        assert fields(text) == ["n"] and text.endswith("?")


def test_statements_tell_relations_apart():
    states = [text for relation in RELATIONS.values() for text in relation.states]
    kinds = {relation: kind for kind, about in KINDS.items() for section in about.sections for relation in section}
    assert len({(kinds[name], text) for name, relation in RELATIONS.items() for text in relation.states}) == len(states)
    asked = [(kinds[name], text) for name, relation in RELATIONS.items() for text in (*relation.asks, *relation.asks_held_out)]
    assert len(set(asked)) == len(asked)


def test_every_spelling_is_unique():
    """Surnames and towns spell their digits uniquely: all 216,000 surnames and all 122,400 towns."""
    for mids, ends in ((invented_words.MIDS, invented_words.ENDS), (invented_words.TOWN_MIDS, invented_words.TOWN_ENDS)):
        endings = [end for group in ends for end in group]
        spelled = {"".join(parts) for parts in itertools.product(invented_words.FIRSTS, mids, endings)}
        assert len(spelled) == len(invented_words.FIRSTS) * len(mids) * len(endings)
    given = {stem + end for stem in invented_words.GIVEN_STEMS for group in invented_words.GIVEN_ENDS for end in group}
    assert len(given) == len(invented_words.GIVEN_STEMS) * sum(map(len, invented_words.GIVEN_ENDS))


@pytest.mark.parametrize("table", ["TOWN_QUALIFIERS", "SCHOOLS", "FIRMS", "TITLES", "SHIPS", "SCENES", "PLANT_LOOKS"])
def test_a_word_that_tells_a_family_apart_is_in_one_group_only(table):
    flat = [word for group in getattr(invented_words, table) for word in group]
    assert len(set(flat)) == len(flat)


def test_names_determine_the_entity_up_to_the_capacity():
    assert CAPACITY >= 10**7
    data = Invented(CAPACITY, seed=3)
    names = collections.Counter()
    for kind in KINDS:
        for family in range(0, CAPACITY // 34, 97):
            names.update([data._entity(kind, family, variant).name.title for variant in range(KINDS[kind].family)])
    assert max(names.values()) == 1
    for kind, shuffle in data._families.items():
        assert math.gcd(shuffle.factor, shuffle.size) == 1, kind


@pytest.mark.parametrize("kind", KINDS)
def test_different_digits_spell_different_names(kind):
    """All families that agree in all but a few digits: where a clash of spellings would be."""
    spell, radices = invented._NAMES[kind]
    digits = list(itertools.product(*(range(min(radix, 8)) for radix in radices)))
    names = {spell(variant, *choice).title for choice in digits for variant in range(KINDS[kind].family)}
    assert len(names) == len(digits) * KINDS[kind].family


def test_shuffle_is_a_permutation():
    for size, key in itertools.product((1, 2, 8, 30, 440), range(20)):
        shuffle = invented._Shuffle(size, invented._Dice(f"any {key}"))
        assert sorted(map(shuffle, range(size))) == list(range(size))


def edits(left: str, right: str) -> int:
    """Levenshtein distance."""
    row = list(range(len(right) + 1))
    for i, a in enumerate(left, 1):
        previous, row = row, [i]
        for j, b in enumerate(right, 1):
            row.append(min(previous[j] + 1, row[-1] + 1, previous[j - 1] + (a != b)))
    return row[-1]


def test_families_have_nearly_identical_names(data):
    for kind, about in KINDS.items():
        for family in range(40):
            names = [data._entity(kind, family, variant).name.title for variant in range(about.family)]
            for left, right in itertools.combinations(names, 2):
                parts = sum(a != b for a, b in itertools.zip_longest(left.split(), right.split()))
                assert parts == 1 or edits(left, right) <= 5, (left, right)


def test_passages_have_the_promised_shape(passages):
    assert len(passages) == SIZE
    for passage in passages.values():
        assert 25 <= len(passage.content.split()) <= 60, passage
        assert passage.text[0].isupper() and passage.text.endswith(".")
        assert "{" not in passage.content and "  " not in passage.text
        assert not re.search(r"\b(the the|a [AEIOUaeiou]|The the)\b", passage.text), passage.text
        for sentence in re.split(r"(?<=\.) ", passage.text):
            assert sentence[0].isupper(), passage.text
        assert passage.text.lower().count(passage.title.lower()) == 1  # named once, then by short forms and pronouns


def test_several_facts_a_passage_and_several_passages_an_entity(data, passages):
    relations = collections.Counter(len(data._facts(index)[2]) for index in range(340))
    assert set(relations) <= {2, 3, 4}
    titles = collections.Counter(passage.title for passage in passages.values())
    assert set(titles.values()) == {1, 2, 3}


def test_answers_are_in_the_gold_passage_and_rarely_elsewhere(passages, questions):
    for question in itertools.chain(*questions.values()):
        for answer in question.answers:
            assert answer in passages[question.gold_id].text, question
        assert 1 <= len(question.answers[0].split()) <= 4
        assert question.answers[0] not in question.question
    texts = [passage.content for passage in passages.values()]
    holders = [sum(question.answers[0] in text for text in texts) for question in questions["test"][::5]]
    assert sum(holders) / len(holders) < 3
    assert max(holders) < SIZE / 50


def test_the_question_names_its_entity(passages, questions):
    for question in itertools.chain(*questions.values()):
        assert passages[question.gold_id].title.lower() in question.question.lower()


def test_splits_share_no_fact_and_cover_all(questions):
    facts = {split: {fact(question) for question in asked} for split, asked in questions.items()}
    assert not facts["train"] & facts["test"] and not facts["train"] & facts["dev"] and not facts["dev"] & facts["test"]
    assert sum(map(len, facts.values())) == SIZE // 34 * 100
    assert len(questions["test"]) == len(facts["test"]) == len(questions["dev"]) == 1000
    ids = [question.id for asked in questions.values() for question in asked]
    assert len(set(ids)) == len(ids)
    for asked in questions.values():
        assert {fact(question)[1] for question in asked} == set(RELATIONS)


def test_a_fact_stays_in_its_split_when_the_corpus_grows(questions):
    bigger = Invented(2 * SIZE)
    test = {fact(question) for question in bigger.questions("test", bigger.count("test"))}
    assert {fact(question) for question in questions["test"]} <= test
    assert not {fact(question) for question in questions["train"]} & test


def test_held_out_wordings_never_train(questions, passages):
    def wordings(split):
        for question in questions[split]:
            name = re.escape(passages[question.gold_id].title)
            yield fact(question)[1], re.sub(name, "{n}", question.question, flags=re.IGNORECASE)

    train, dev, test = (set(wordings(split)) for split in ("train", "dev", "test"))
    assert not train & (dev | test)
    assert train == {(name, text) for name, relation in RELATIONS.items() for text in relation.asks}
    assert test <= {(name, text) for name, relation in RELATIONS.items() for text in relation.asks_held_out}


def test_train_asks_every_fact_once_before_any_twice(data, questions):
    once = data.count("train") // 3
    assert len({fact(question) for question in questions["train"][:once]}) == once
    assert len({question.question for question in questions["train"]}) == 3 * once


def test_no_answer_is_a_good_guess(questions):
    """A closed-book guess of the most frequent answer of a relation stays under 2 %."""
    per_relation = collections.defaultdict(collections.Counter)
    for name, relation in RELATIONS.items():
        value = invented._VALUES[relation.value]
        per_relation[name].update(value(invented._Dice(f"{name} {i}"), 1350 + i % 550) for i in range(2000))
    for name, counts in per_relation.items():
        assert max(counts.values()) / sum(counts.values()) < 0.02, name


def test_the_corpus_is_a_function_of_seed_and_index():
    assert list(Invented(100).corpus()) == list(Invented(100).corpus())
    assert list(itertools.islice(Invented(10**7).corpus(), 100)) == list(Invented(100).corpus())
    assert Invented(10**7).passage(9_876_543) == Invented(CAPACITY).passage(9_876_543)
    assert list(Invented(1000).questions("dev", 50)) == list(Invented(1000).questions("dev", 50))
    assert not {p.title for p in Invented(1000, seed=1).corpus()} & {p.title for p in Invented(1000, seed=2).corpus()}


def test_the_text_is_the_same_on_every_machine():
    """One seed names one text, on any Python and in any process. An edit of the words changes this hash: say so in the commit."""
    digest = hashlib.sha256("\n".join(p.content for p in Invented(1000, seed=7).corpus()).encode()).hexdigest()
    assert digest[:12] == "cbdd4336211a"


def test_the_stream_holds_nothing():
    data = Invented(10**7)
    list(itertools.islice(data.corpus(), 100))
    tracemalloc.start()
    collections.deque(itertools.islice(data.corpus(), 5000), maxlen=0)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 100_000  # bytes; 5,000 passages are 1.5 MB


def test_errors_say_what_was_expected(data):
    with pytest.raises(InputError, match="passages = 33, expected 34"):
        Invented(33)
    with pytest.raises(InputError, match="passages"):
        Invented(CAPACITY + 1)
    with pytest.raises(InputError, match="'valid', expected one of test, dev, train"):
        data.questions("valid", 3)
    with pytest.raises(InputError, match="1,001 test questions"):
        data.questions("test", 1001)
    with pytest.raises(InputError, match="passage 3,400"):
        data.passage(3400)
