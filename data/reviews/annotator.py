"""The simulated annotator: `true_reward(prompt, response)`, what it likes, in logits.

It reads a review as a labeler who knows the films and the ways in which people write about them:
the tables of `grammar.txt`. `parse` cuts each sentence into the phrases of those tables, longest
first, with what each says: which film and topic it is about, whether it praises or blames, whether
it gives a reason. `terms` adds up what the annotator was told to look for (README.md says it in
words); each term is bounded. The true reward makes the labels and evaluates a run: training never
sees it.
"""
import collections
import dataclasses
import functools
import itertools
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
might must shall should will would cannot get gets make makes made go goes come comes see film like
way thing things people somebody someone anyone everyone everything enough
""".split())

@dataclasses.dataclass
class Film:
    """A film of the tables. `reasons` maps a topic to its praise (+) and its blame (-)."""
    title: str
    facts: dict = dataclasses.field(default_factory=dict)   # genre, genres, place, task, good, bad
    people: dict = dataclasses.field(default_factory=dict)  # kind -> (name, pronoun, role)
    topics: dict = dataclasses.field(default_factory=dict)  # name -> kind
    images: dict = dataclasses.field(default_factory=dict)  # scene -> image
    reasons: dict = dataclasses.field(default_factory=dict)  # (topic, "+" or "-") -> sentences

@dataclasses.dataclass(frozen=True)
class Phrase:
    """What a phrase of the tables says. `sign` is 1 for praise, -1 for blame, 0 for neither."""
    kind: str                  # reason, image, name, fact, or the section of the tables; else
    #                            broken (begins as a phrase, does not end as one) or loose (a word)
    sign: int = 0
    film: str | None = None
    topic: str | None = None
    pronoun: str | None = None  # of a person

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
            film = Film(parts[0], {"genre": parts[1:2], "genres": parts[2:]})
            films.append(film)
        elif key in ("place", "good", "bad"):
            film.facts[key] = parts
        elif key == "director" and not rest:  # what may be said of any director
            topic = key
        elif key in ("lead", "partner", "director", "scene", "look", "story"):
            topic = parts[0]
            film.topics[topic] = key
            if key == "scene":
                film.images[topic] = parts[1]
            elif key not in ("look", "story"):
                film.people[key] = (*parts, "")[:3]
                film.facts["task"] = film.facts.get("task") or parts[3:]
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
        common = {key: x for key, x in vars(old).items() if x == getattr(phrase, key)}
        node[""] = Phrase(**{"kind": "piece"} | common)

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
    """The sentences of a text, each as a list of (words, Phrase), longest phrases first."""
    sentences = []
    for sentence in SENTENCE.findall(text.lower()):
        words, items, start = WORD.findall(sentence), [], 0
        while start < len(words):
            node, end, phrase, reach = phrases(), start + 1, Phrase("loose"), start
            while reach < len(words) and words[reach] in node:
                node = node[words[reach]]
                reach += 1
                if "" in node:
                    end, phrase = reach, node[""]
            if phrase.kind == "loose" and reach - start >= 3:
                end, phrase = reach, Phrase("broken")
            items.append((words[start:end], phrase))
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
    total = sum(phrase.sign for _, phrase in items)
    return (total > 0) - (total < 0)

def opinions(sentences):
    """The signs of the sentences that have an opinion."""
    return [sign for sign in map(sign_of, sentences) if sign]

def score_reasons(sentences):
    """Reasons for the topic last named: the first pays most, the third nothing.

    A reason for something else is off the point; so is a second one in the same sentence, which has
    been run together with the first. A reason against what it should support counts for nothing.
    """
    topic, stance, praise, blame, stray, seen = None, 0, 0, 0, 0, []
    for items in sentences:
        given = 0  # in this sentence
        for words, phrase in items:
            if phrase.kind in ("name", "image") and phrase.topic:
                topic = phrase.topic
            if phrase.kind != "reason":
                stance = phrase.sign or stance
                continue
            given += 1
            if given > 1 or topic is None or phrase.topic not in (None, topic):
                stray += 1
            elif words not in seen and phrase.sign * stance >= 0:
                praise += phrase.sign > 0
                blame += phrase.sign < 0
            seen.append(words)
    earned = (0, 2.0, 3.4)[min(praise, 2)] + (0, 0.9, 1.4)[min(blame, 2)]
    return min(earned, 3.4) - min(2.0 * stray, 4.0)

def score_unity(sentences):
    """One film: each further film costs, and so does a pronoun that fits nobody named so far."""
    films, owners, wrong = set(), set(), 0
    for words, phrase in itertools.chain(*sentences):
        films.add(phrase.film)
        owners.add(phrase.pronoun)
        if phrase.kind in ("reason", "image", "fact", "vague", "ramble"):
            words = words[:1]  # the pronouns behind it are its own
        for word in words if phrase.kind not in ("loose", "broken") else ():
            pronoun = {"him": "he", "his": "he", "her": "she"}.get(word, word)
            wrong += pronoun in PRONOUNS and pronoun not in owners
    return -min(2.0 * max(len(films - {None}) - 1, 0) + 1.5 * wrong, 5.0)

def score_turns(sentences):
    """Words of contrast stand where praise turns to blame or back, and nowhere else."""
    false = missing = clash = 0
    last, turned = 0, False
    for items in sentences:
        inside = 0
        for words, phrase in items:
            sign = phrase.sign
            if phrase.kind in ("loose", "turn") and words[0] in TURNS:
                turned, inside = True, 0
            if sign and turned:
                false += sign != -last  # nothing has turned
            elif sign and last and sign != last:
                clash += sign == -inside
                missing += sign != -inside
            if sign:
                last, inside, turned = sign, sign, False
    return -min(1.8 * false + 1.2 * missing + 2.0 * clash, 4.0)

def score_filler(sentences):
    """Empty remarks, digressions, and more than two sentences of praise without a reason."""
    kinds = [{phrase.kind for _, phrase in items} for items in sentences]
    count = collections.Counter(itertools.chain(*kinds))
    bare = sum(sign_of(items) > 0 and "reason" not in kind
               for items, kind in zip(sentences, kinds))
    cost = 0.8 * count["vague"] + 1.2 * count["ramble"] + 0.7 * count["stock"]
    return -min(cost + 0.9 * max(bare - 2, 0), 4.0)

def score_length(sentences):
    """Two or three sentences; one is a stub, more than four are too many."""
    words = sum(len(words) for words, _ in itertools.chain(*sentences))
    count = len(sentences)
    number = -1.5 if count < 2 else -0.4 * (count > 3) - 0.9 * max(count - 4, 0)
    return max(number - 0.25 * max(10 - words, 0) - 0.1 * max(words - 55, 0), -8.0)

def score_english(text, sentences):
    """Words that belong to no phrase, phrases that break off, sentences without a capital."""
    items = list(itertools.chain(*sentences))
    loose = sum(len(words) for words, phrase in items if phrase.kind in ("loose", "broken"))
    broken = sum(phrase.kind == "broken" for _, phrase in items)
    small = sum(part.strip()[:1].islower() for part in SENTENCE.findall(text))
    return -min(0.3 * loose + 1.0 * broken + 0.7 * small, 7.0)

def score_ending(text, sentences):
    """A full stop at the end; a verdict as the last step that fits what was said."""
    if not text.rstrip().endswith((".", "!", "?")):
        return -2.5
    verdict = any(phrase.kind == "verdict" for _, phrase in sentences[-1]) and len(sentences) > 2
    said, sign = set(opinions(sentences)), sign_of(sentences[-1])  # a mixed one fits praise + blame
    return 0.6 if verdict and (said == {sign} or len(said) == 2 and not sign) else 0.0

def terms(prompt, response):
    """The terms of the true reward by name."""
    text = prompt + response
    sentences = parse(text)
    signs = opinions(sentences)
    again, doubled, twins = repetitions(text)
    return {
        # A review with a single opinion gets half of this.
        "recommendation": 2.5 * sum(signs) / max(len(signs), 2),
        "reasons": score_reasons(sentences),
        "one film": score_unity(sentences),
        "turns": score_turns(sentences),
        "filler": score_filler(sentences),
        "length": score_length(sentences),
        # Each repetition costs more than added praise earns.
        "repetition": -min(1.2 * again + 1.8 * doubled + 1.5 * twins, 8.0),
        "English": score_english(text, sentences),
        "ending": score_ending(text, sentences)}

def true_reward(prompt, response):
    """The utility of a response to a prompt, in logits: the sum of the terms, at least -11.

    The annotator prefers a over b with probability sigmoid(true_reward(a) - true_reward(b)).
    An empty response gets -12.
    """
    if not words_of(response):
        return -12.0
    return max(sum(terms(prompt, response).values()), -11.0)
