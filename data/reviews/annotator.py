"""The simulated annotator: `true_reward(prompt, response)`, what it likes, in logits.

It reads a review as a labeler who knows the films and the ways in which people write about them:
the tables of `grammar.txt`. `parse` cuts each sentence into the phrases of those tables, longest
first, and remembers what each phrase says: which film and topic it is about, whether it praises or
blames, and whether it gives a reason. `terms` adds up what the annotator was told to look for. Each
term is bounded. The data card, README.md, says the same in words.

The true reward makes the labels and evaluates a run. Training never sees it.
"""

import dataclasses
import functools
import pathlib
import re

GRAMMAR = pathlib.Path(__file__).with_name("grammar.txt")
WORD = re.compile(r"[a-z0-9]+(?:['-][a-z0-9]+)*")
SENTENCE = re.compile(r"[^.!?]+[.!?]*")
TURNS = frozenset("but still yet although though however instead unfortunately".split())
PRONOUNS = {"she": ("she", "her", "her"), "he": ("he", "him", "his")}

# Words that may return in a review without being noticed.
COMMON = frozenset("""
a an the and or but nor if as at by for from in into of off on onto out over to up with without
about than then that this these those there here it its is are was were be been being am do does
did done have has had having i me my mine we us our you your he him his she her hers they them
their who whom whose what which when where while why how because so not no never nothing nobody
none only just too very more most less least much many few all any some every each both one two
other another such own same even still yet ever again once after before until since can could may
might must shall should will would cannot get gets make makes made go goes come comes see film
like way thing things people somebody someone anyone everyone everything
""".split())


@dataclasses.dataclass
class Film:
    """A film of the tables. `reasons` maps a topic to its praise (+) and its blame (-)."""
    title: str
    genre: str
    facts: dict = dataclasses.field(default_factory=dict)   # place, task, good, bad
    people: dict = dataclasses.field(default_factory=dict)  # kind -> (name, pronoun, role)
    topics: dict = dataclasses.field(default_factory=dict)  # name -> kind
    images: dict = dataclasses.field(default_factory=dict)  # scene -> image
    reasons: dict = dataclasses.field(default_factory=dict)  # (topic, "+" or "-") -> sentences

    @property
    def genres(self):
        return self.genre[:-1] + "ies" if self.genre.endswith("y") else self.genre + "s"


@dataclasses.dataclass(frozen=True)
class Phrase:
    """What a phrase of the tables says. `sign` is 1 for praise, -1 for blame, 0 for neither."""
    kind: str                  # reason, image, name, fact, or the section of the tables
    sign: int = 0
    film: str | None = None
    topic: str | None = None
    pronoun: str | None = None  # of a person


@dataclasses.dataclass
class Item:
    """A stretch of a sentence: a phrase with its words, or words that belong to no phrase."""
    words: list
    phrase: Phrase | None = None
    broken: bool = False       # begins as a phrase and does not end as one


@functools.cache
def read_grammar(path=GRAMMAR):
    """grammar.txt as (films, sections): (section, class of topics) -> (template, weight) pairs."""
    films, sections, film, topic, heads = [], {}, None, None, None
    for line in path.read_text(encoding="utf-8").split("\n"):
        key, _, rest = line.partition(" ")
        parts = [part.strip() for part in rest.split("|")]
        if not line or key == "#":
            continue
        if key == "@":
            name, *classes = rest.split()
            heads = [(name, kind) for kind in classes or [""]]
        elif heads:
            weight, bar, text = line.partition("| ")
            weighted = (text, int(weight)) if bar and weight.isdigit() else (line, 1)
            for head in heads:
                sections.setdefault(head, []).append(weighted)
        elif key == "film":
            film = Film(*parts)
            films.append(film)
        elif key in ("place", "good", "bad"):
            film.facts[key] = parts
        elif key in ("lead", "partner"):
            topic = parts[0]
            film.people[key], film.topics[topic] = parts[:3], key
            if key == "lead":
                film.facts["task"] = parts[3:]
        elif key == "director" and rest:
            film.people[key], film.topics[parts[0]] = (*parts, ""), key
        elif key in ("scene", "look", "story"):
            topic = parts[0]
            film.topics[topic] = key
            if key == "scene":
                film.images[topic] = parts[1]
        elif key == "director":  # what may be said of any director
            topic = key
        elif key == "any":
            topic = rest
            for film in films:
                film.topics[topic] = key
        elif key in "+-":
            shared = topic == "director" or film.topics[topic] == "any"
            for owner in films if shared else [film]:
                name = owner.people["director"][0] if topic == "director" else topic
                said = rest.format(s=owner.people["director"][1]) if shared else rest
                owner.reasons.setdefault((name, key), []).append(said)
        else:
            raise ValueError(f"{path}: {line!r} is no line of a grammar")
    return films, sections


def words_of(text):
    """The words of a text in lower case."""
    return WORD.findall(text.lower())


def add_phrase(trie, text, phrase):
    """Enters a phrase; the same words with another meaning keep only what both have in common."""
    node = trie
    for word in words_of(text):
        node = node.setdefault(word, {})
    if node is trie:
        return
    old = node.setdefault("", phrase)
    if old != phrase:
        common = {}
        for field, value in dataclasses.asdict(old).items():
            common[field] = value if value == getattr(phrase, field) else None
        common["kind"], common["sign"] = common["kind"] or "piece", common["sign"] or 0
        node[""] = Phrase(**common)


def pieces(template, pronoun):
    """The fixed texts of a template between slots and full stops, with pronouns filled in."""
    subject, them, their = PRONOUNS[pronoun]
    filled = {"{S}": subject, "{s}": subject, "{U}": subject, "{o}": them, "{h}": their,
              "{B}": "both of us", "{N}": "neither of us"}
    for slot, text in filled.items():
        template = template.replace(slot, text)
    return re.split(r"\{\w+\}|[.?]", template)


@functools.cache
def phrases():
    """A trie of all phrases of the tables: word -> node; the key "" holds what ends there."""
    trie = {}
    films, sections = read_grammar()
    for (name, _), lines in sections.items():
        sign = {"+": 1, "-": -1}.get(name[-1], 0)
        for template, _ in lines:
            template, _, companion = template.partition(" | ")
            for pronoun in PRONOUNS:
                for text in pieces(template, pronoun):
                    meant = 0 if text.strip(", ").lower() in TURNS else sign
                    phrase = Phrase(name.rstrip("+-0~"), meant, pronoun=companion or None)
                    add_phrase(trie, text, phrase)
    for film in films:
        title = film.title
        add_phrase(trie, title, Phrase("title", film=title))
        for genre in (film.genre, film.genres):
            add_phrase(trie, genre, Phrase("fact", film=title))
        for key, facts in film.facts.items():
            for fact in facts:
                sign = (key == "good") - (key == "bad")
                add_phrase(trie, fact, Phrase("fact", sign, None if sign else title))
        for name, pronoun, role in film.people.values():
            topic = "director" if film.topics[name] == "director" else name
            add_phrase(trie, name, Phrase("name", 0, title, topic, pronoun))
            add_phrase(trie, role, Phrase("fact", 0, title, None, pronoun))
        for topic, kind in film.topics.items():
            owner = None if kind == "any" else title
            if kind not in film.people:
                add_phrase(trie, topic, Phrase("name", 0, owner, topic))
            add_phrase(trie, film.images.get(topic, ""), Phrase("image", 0, owner, topic))
            for sign in "+-":
                for reason in film.reasons[topic, sign]:
                    about = "director" if kind == "director" else topic
                    said = Phrase("reason", 1 if sign == "+" else -1, owner, about)
                    add_phrase(trie, reason, said)
    return trie


def parse(text):
    """The sentences of a text, each as a list of items, longest phrases first."""
    sentences = []
    for sentence in SENTENCE.findall(text.lower()):
        words, items, start = WORD.findall(sentence), [], 0
        while start < len(words):
            node, end, phrase, reach = phrases(), start, None, start
            while reach < len(words) and words[reach] in node:
                node = node[words[reach]]
                reach += 1
                if "" in node:
                    end, phrase = reach, node[""]
            broken = phrase is None and reach - start >= 3
            end = max(end, reach if broken else start + 1)
            items.append(Item(words[start:end], phrase, broken))
            start = end
        if items:
            sentences.append(items)
    return sentences


# -- what the annotator looks for, each a term in logits

def repetitions(text):
    """How many content words return, how many words are doubled, and "X and X"."""
    text = text.lower()
    for film in read_grammar()[0]:
        text = text.replace(film.title.lower(), film.title.replace(" ", ""))
    words = words_of(text)
    content = [word for word in words if word not in COMMON]
    doubled = sum(one == two for one, two in zip(words, words[1:]))
    twins = sum(one == two for one, two in zip(words, words[2:]) if one not in COMMON)
    return len(content) - len(set(content)), doubled, twins


def sign_of(items):
    """1 if a sentence praises on the whole, -1 if it blames, 0 if neither."""
    total = sum(item.phrase.sign for item in items if item.phrase)
    return (total > 0) - (total < 0)


def score_recommendation(sentences):
    """Is the film recommended? All sentences with an opinion count; two are enough."""
    signs = [sign for sign in map(sign_of, sentences) if sign]
    return 2.5 * sum(signs) / max(len(signs), 2)


def score_reasons(sentences):
    """A reason that belongs to the topic last named: the first pays most, the third nothing.

    A reason for something else than what was just named is off the point, and so is a second one
    in the same sentence, which has been run together with the first. A reason that speaks against
    what it should support counts for nothing.
    """
    topic, stance, praise, blame, stray, seen = None, 0, 0, 0, 0, set()
    for items in sentences:
        given = 0  # in this sentence; a second one has been run together with the first
        for item in items:
            phrase = item.phrase
            if phrase and phrase.kind in ("name", "image") and phrase.topic:
                topic = phrase.topic
            if not phrase or phrase.kind != "reason":
                stance = phrase.sign or stance if phrase else stance
                continue
            given += 1
            if given > 1 or topic is None or phrase.topic not in (None, topic):
                stray += 1
            elif tuple(item.words) not in seen and phrase.sign * stance >= 0:
                praise += phrase.sign > 0
                blame += phrase.sign < 0
            seen.add(tuple(item.words))
    earned = (0, 2.2, 3.0)[min(praise, 2)] + (0, 0.9, 1.2)[min(blame, 2)]
    return min(earned, 3.0) - min(2.0 * stray, 4.0)


def score_unity(sentences):
    """One film: each other film costs, and so does a pronoun that nobody named so far can own."""
    films, owners, wrong = [], set(), 0
    for item in (item for items in sentences for item in items if item.phrase):
        phrase = item.phrase
        if phrase.film and phrase.film not in films:
            films.append(phrase.film)
        if phrase.pronoun:
            owners.add(phrase.pronoun)
        free = phrase.kind not in ("reason", "image", "fact", "vague", "ramble")
        for word in item.words if free else item.words[:1]:
            pronoun = {"him": "he", "his": "he", "her": "she"}.get(word, word)
            wrong += pronoun in PRONOUNS and pronoun not in owners
    return -min(2.0 * max(len(films) - 1, 0) + 1.5 * wrong, 5.0)


def score_turns(sentences):
    """Words of contrast stand where praise turns to blame or back, and nowhere else."""
    false = missing = clash = 0
    last, turned = 0, False
    for items in sentences:
        inside = 0
        for item in items:
            loose = not item.phrase and not item.broken and TURNS & set(item.words)
            if loose or item.phrase and item.phrase.kind == "turn" and not item.phrase.sign:
                turned = True
                inside = 0
            sign = item.phrase.sign if item.phrase else 0
            if not sign:
                continue
            if turned:
                false += sign == last
            elif last and sign != last:
                clash += sign == -inside
                missing += sign != -inside
            last, inside, turned = sign, sign, False
    return -min(1.8 * false + 1.2 * missing + 2.0 * clash, 4.0)


def score_filler(sentences):
    """What says nothing, what leads away from the film, and praise without a reason, piled up."""
    kinds = [{item.phrase.kind for item in items if item.phrase} for items in sentences]
    vague = sum("vague" in kind for kind in kinds)
    ramble = sum("ramble" in kind for kind in kinds)
    stock = sum("stock" in kind for kind in kinds)
    bare = sum(sign_of(items) > 0 and "reason" not in kind
               for items, kind in zip(sentences, kinds))
    return -min(0.8 * vague + 1.2 * ramble + 0.7 * stock + 0.9 * max(bare - 2, 0), 4.0)


def score_length(sentences):
    """Two or three sentences; one is a stub, more than four are too many."""
    words = sum(len(item.words) for items in sentences for item in items)
    count = len(sentences)
    number = -1.5 if count < 2 else -0.4 * (count > 3) - 0.9 * max(count - 4, 0)
    return max(number - 0.25 * max(10 - words, 0) - 0.1 * max(words - 55, 0), -8.0)


def score_repetition(text):
    """Each repetition costs more than another praise earns."""
    again, doubled, twins = repetitions(text)
    return -min(1.2 * again + 1.8 * doubled + 1.5 * twins, 8.0)


def score_english(text, sentences):
    """Words that belong to no phrase, phrases that break off, sentences without a capital."""
    loose = sum(len(item.words) for items in sentences for item in items if not item.phrase)
    broken = sum(item.broken for items in sentences for item in items)
    small = sum(part.strip()[:1].islower() for part in SENTENCE.findall(text))
    return -min(0.3 * loose + 1.0 * broken + 0.7 * small, 7.0)


def score_ending(text, sentences):
    """A full stop at the end; a verdict as the last step that fits what was said."""
    if not text.rstrip().endswith((".", "!", "?")):
        return -2.5
    verdict = any(item.phrase and item.phrase.kind == "verdict" for item in sentences[-1])
    signs = {sign for sign in map(sign_of, sentences) if sign}
    return 0.6 if verdict and len(sentences) > 1 and len(signs) == 1 else 0.0


def terms(prompt, response):
    """The terms of the true reward by name."""
    text = prompt + response
    sentences = parse(text)
    return {
        "recommendation": score_recommendation(sentences),
        "reasons": score_reasons(sentences),
        "one film": score_unity(sentences),
        "turns": score_turns(sentences),
        "filler": score_filler(sentences),
        "length": score_length(sentences),
        "repetition": score_repetition(text),
        "English": score_english(text, sentences),
        "ending": score_ending(text, sentences),
    }


def true_reward(prompt, response):
    """The utility of a response to a prompt, in logits: the sum of the terms, at least -11.

    The annotator prefers a over b with probability sigmoid(true_reward(a) - true_reward(b)).
    An empty response gets -12.
    """
    if not words_of(response):
        return -12.0
    return max(sum(terms(prompt, response).values()), -11.0)
