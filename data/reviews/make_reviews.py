"""Makes the shipped reviews and preferences: corpus.txt and preferences.jsonl, byte for byte.

    python -m data.reviews.make_reviews [--seed 0] [--out DIR]
    python -m data.reviews.make_reviews --check out     # a run's reward model, flaw by flaw

A review is about one film of `grammar.txt` and follows a plan: a first step takes up a topic, a
second step says more about it or goes on to another, a last step draws the conclusion. A ranking
puts four continuations of one opening in order: two honest ones, which are other reviews that
happen to begin with the same words, and a variant of each with one flaw.
"""

import argparse
import collections
import dataclasses
import itertools
import json
import math
import pathlib
import random
import re
import statistics

from data.reviews.annotator import Film, PRONOUNS, read_grammar, repetitions, true_reward, words_of

HERE = pathlib.Path(__file__).parent
REVIEWS, POOL, RANKINGS = 24_000, 100_000, 16_000
FILMS, SECTIONS = read_grammar()


# -- one sentence

@dataclasses.dataclass
class Sentence:
    """A template with its slots filled; flaws fill them differently."""
    section: str               # the section that the template is from
    template: str
    film: Film
    topic: str | None = None   # what it is about
    reason: str | None = None
    sign: str = "0"            # + praises, - blames, 0 neither
    companion: tuple | None = None

    def __str__(self):
        """The text, from its capital to its full stop."""
        film, topic, template = self.film, self.topic, self.template
        slots = {"T": film.title} | {key: values[0] for key, values in film.facts.items()}
        slots["P"], pronoun, slots["R"] = film.people[self.person()]
        slots["s"], slots["o"], slots["h"] = PRONOUNS[pronoun]
        if topic:
            slots["x"], slots["image"] = topic, film.images.get(topic, "")
            slots["good"] = film.facts["good"][len(self.reason or "") % len(film.facts["good"])]
            slots["bad"] = film.facts["bad"][len(self.reason or "") % len(film.facts["bad"])]
        if self.reason:
            slots["why"] = self.reason
        if self.companion:
            name, subject = self.companion
            slots["C"], slots["U"] = name.format(**slots), capital(subject)
            slots["B"], slots["N"] = "Both of us", "Neither of us"
        slots |= {key.capitalize(): capital(text) for key, text in slots.items() if key in LOWER}
        return capital(template.format(**slots))

    def person(self):
        """Whom the pronouns and {P} mean: the topic if it is a person, or else the lead."""
        kind = self.film.topics.get(self.topic)
        return kind if kind in self.film.people else "lead"


LOWER = ("x", "why", "s")  # slots that a template may begin with, as {X}, {Why}, {S}


def capital(text):
    """The text with a capital at its beginning."""
    return text[:1].upper() + text[1:]


def pick(rng, lines):
    """One of the weighted lines."""
    return rng.choices([text for text, _ in lines], [weight for _, weight in lines])[0]


# -- one review

ATTITUDES = {"+": 30, "-": 30, "~": 10, "0": 30}  # praise, blame, praise and blame, neither
WEIGHTS = {"scene": 3, "lead": 4, "any": 0.7}     # of a class of topics; of the others, 2


class Writer:
    """Writes one review: it knows the film, the attitude, and what has been said."""

    def __init__(self, rng):
        self.rng = rng
        self.film = rng.choice(FILMS)
        self.attitude = self.draw(ATTITUDES)
        self.sign = rng.choice("+-") if self.attitude == "~" else self.attitude
        self.sentences, self.used, self.companion = [], set(), None

    def draw(self, weights):
        """A key of the dictionary, by its weight."""
        return self.rng.choices(list(weights), list(weights.values()))[0]

    def topic(self, *classes):
        """A topic of one of these classes that has not been taken up yet."""
        topics = self.film.topics
        free = [topic for topic in topics if topics[topic] in classes and topic not in self.used]
        return self.draw({topic: WEIGHTS.get(topics[topic], 2) for topic in free})

    def say(self, section, sign, topic=None, kind=None):
        """Adds a sentence of a section that fits the class of the topic."""
        kind = kind or self.film.topics.get(topic, "")
        lines = SECTIONS.get((section, kind), [])
        if kind:
            lines = lines + SECTIONS.get((section, ""), [])
        template = pick(self.rng, lines)
        reason = None
        if "{why}" in template or "{Why}" in template:
            reason = self.rng.choice(self.reasons(topic, sign))
        self.used.add(topic)
        sentence = Sentence(section, template, self.film, topic, reason, sign, self.companion)
        self.sentences.append(sentence)

    def begin(self):
        """The first step, a sentence or two; returns the topic that they were about, if any."""
        sign, judged = self.sign, self.sign != "0"
        plans = {"claim": 38, "intro": 26, "with": 12, "genre": 5, "image": 6, "ask": 4, "idle": 9}
        plan = self.draw(plans if judged else plans | {"ask": 0, "idle": 45})
        if plan == "idle":
            return self.idle()
        if plan == "with":
            name, pronoun = self.rng.choice(SECTIONS["companion", ""])[0].split(" | ")
            self.companion = name, pronoun
            self.say("intro", "0", kind="with")
        if plan == "genre":
            self.say("intro", "0", kind="genre")
        unjudged_claim = plan == "claim" and not judged
        topic = self.topic(*(NOUNS + ("lead", "partner") if unjudged_claim else CLASSES[plan]))
        if plan == "image":
            self.say("intro", "0", topic, "image")
        if plan == "intro":
            self.say("intro", "0", topic)
            said = self.sentences[-1].template
            nameless = "{task}" in said and "{P}" not in said
            self.say("then" + sign, sign, topic, "task" if nameless else None)
        elif judged or plan == "claim":
            self.say(plan + sign, sign, topic)
        else:
            self.say(plan + sign, sign, kind="")
        return topic

    def idle(self):
        """A beginning that leaves all open; returns the topic of the claim behind it, if any."""
        director, topic = self.film.people["director"][0], None
        opened = self.rng.random() < 0.6
        if opened:
            self.say("opener", "0", director, "")
        if self.sign == "0":
            self.say(self.draw({"vague": 6, "ramble": 4}), "0")
        elif opened and self.rng.random() < 0.7:
            topic = self.topic(*CLASSES["claim"])
            self.say("claim" + self.sign, self.sign, topic)
        else:
            self.say("stock" + self.sign, self.sign)
        return topic

    def go_on(self, topic):
        """The second step; returns the topic that the review is at."""
        sign = self.sign
        if self.attitude == "~":
            self.sign = sign = "+" if sign == "-" else "-"
            return self.turn()
        steps = {"further": 30, "more": 26, "next": 14, "vague": 5, "ramble": 8, "stock": 6,
                 "stop": 11}
        if sign == "0":
            steps = {"vague": 32, "ramble": 20, "claim": 14, "save": 18, "stop": 16}
        elif topic is None:  # nothing has been said yet
            steps = {"next": 25, "vague": 20, "ramble": 20, "stock": 20, "stop": 15}
        step = self.draw(steps)
        if step == "save":
            self.sign = self.attitude = "+"
            return self.turn("save")
        if step == "further" and not self.reasons(topic, sign):
            step = "more"
        if step == "next":
            topic = self.topic(*CLASSES["next"])
        if step == "claim":
            topic = self.topic(*CLASSES["with"])
        if step in ("vague", "ramble"):
            self.say(step, "0")
        elif step == "stock":
            self.say("stock" + sign, sign)
        elif step != "stop":
            self.say(step + sign, sign, topic)
        return topic

    def turn(self, section="turn"):
        """But something else is better, or worse; or something saves what had no opinion."""
        topic = self.topic("any")
        self.say(section + self.sign, self.sign, topic)
        return topic

    def reasons(self, topic, sign):
        """The reasons that may come next: any, or the one after the last that was given."""
        reasons = self.film.reasons[topic, sign]
        given = [one.reason for one in self.sentences if one.reason in reasons]
        if not given:
            return reasons
        following = reasons[(reasons.index(given[-1]) + 1) % len(reasons)]
        return [] if following in given else [following]

    def write(self):
        """All steps: the sentences of a review."""
        topic = self.go_on(self.begin())
        if self.rng.random() < 0.12 and self.attitude != "~":
            topic = self.go_on(topic)
        chance = {"+": 0.62, "-": 0.62, "~": 0.5, "0": 0.35}[self.attitude]
        if self.rng.random() < chance:
            fitting = topic if self.sentences[-1].topic == topic and self.attitude in "+-" else None
            self.say("verdict" + self.attitude, self.attitude, fitting)
        return self.sentences


NOUNS = ("scene", "look", "story", "any")
EVERYTHING = NOUNS + ("lead", "partner", "director")
CLASSES = {  # what a plan can be about
    "claim": EVERYTHING, "intro": ("scene", "look", "story", "lead"), "with": NOUNS + ("lead",),
    "genre": ("scene", "look", "story"), "ask": ("scene", "look", "story"), "image": ("scene",),
    "next": ("look", "story", "any", "lead", "partner")}


def text_of(sentences):
    """The sentences as running text."""
    return " ".join(map(str, sentences))


def reads_well(sentences):
    """No content word twice, no two sentences that begin alike, no "It is dull: it is long"."""
    text = text_of(sentences)
    starts = [str(sentence).split()[:2] for sentence in sentences]
    pairs = itertools.combinations(starts, 2)
    alike = any(one == two for one, two in pairs if one != ["It", "is"])
    echo = re.search(r"\b(It is|It) [^.]*\bit is", text)
    return not alike and not echo and not any(repetitions(text)) and 3 <= len(text.split()) <= 60


def reviews(rng):
    """Reviews without end: (text, sentences), each text once."""
    seen = set()
    while True:
        sentences = Writer(rng).write()
        text = text_of(sentences)
        if text not in seen and reads_well(sentences):
            seen.add(text)
            yield text, sentences


# -- flaws: each changes one thing in a review behind its opening

JUDGMENTS = set("superb wonderful excellent dull miscast poor good bad better best worst".split())
JUDGMENTS.update(word for film in FILMS for key in ("good", "bad") for word in film.facts[key])


def words_behind(sentences, prompt):
    """The number of the first word behind the opening, and all words."""
    return len(prompt.split()), text_of(sentences).split(" ")


def double_word(rng, sentences, prompt):
    """A word twice."""
    start, words = words_behind(sentences, prompt)
    where = [i for i in range(start, len(words)) if words[i].isalpha()]
    if where:
        i = rng.choice(where)
        return " ".join(words[:i + 1] + [words[i].lower()] + words[i + 1:])


def twin_word(rng, sentences, prompt):
    """"Clever and clever"."""
    start, words = words_behind(sentences, prompt)
    where = [i for i in range(start, len(words)) if words[i].strip(",:.") in JUDGMENTS]
    if where:
        i = rng.choice(where)
        return " ".join(words[:i] + [words[i].strip(",:."), "and"] + words[i:])


def cut_off(rng, sentences, prompt):
    """No end."""
    start, words = words_behind(sentences, prompt)
    if len(words) > start + 3:
        return " ".join(words[:rng.randrange(start + 2, len(words))]).rstrip(",:.?")


def changed(sentences, i, **fields):
    """The text with one sentence changed."""
    other = dataclasses.replace(sentences[i], **fields)
    return text_of([*sentences[:i], other, *sentences[i + 1:]])


def reasoned(sentences):
    """The numbers of the sentences that give a reason."""
    return [i for i, sentence in enumerate(sentences) if sentence.reason]


def say_again(rng, sentences, prompt):
    """The same sentence again, the same reason again, or the same topic named again."""
    i = rng.randrange(len(sentences))
    one = sentences[i]
    if rng.random() < 0.3 or not one.reason or len(one.film.reasons[one.topic, one.sign]) < 2:
        return text_of([*sentences[:i + 1], *sentences[i:]])
    if rng.random() < 0.7:  # "Better still," and the same reason
        template = rng.choice(SECTIONS["further" + one.sign, ""])[0]
        again = dataclasses.replace(one, section="further" + one.sign, template=template)
        return text_of([*sentences[:i + 1], again, *sentences[i + 1:]])
    kind = one.film.topics[one.topic]
    section = rng.choice(["claim", "next"]) + one.sign
    template = rng.choice(SECTIONS[section, kind])[0]
    others = [reason for reason in one.film.reasons[one.topic, one.sign] if reason != one.reason]
    again = dataclasses.replace(one, section=section, template=template, reason=rng.choice(others))
    return text_of([*sentences[:i + 1], again, *sentences[i + 1:]])


def false_contrast(rng, sentences, prompt):
    """A word of contrast where nothing turns."""
    if len({sentence.sign for sentence in sentences} & {"+", "-"}) != 1:
        return None
    text = text_of(sentences)
    signed = [i for i, sentence in enumerate(sentences) if i and sentence.sign != "0"]
    if ", because " in text[len(prompt):] and rng.random() < 0.4:
        head, tail = text[:len(prompt)], text[len(prompt):]
        return head + tail.replace(", because ", rng.choice((", but ", ", yet ", ", although ")), 1)
    if signed:
        i = rng.choice(signed)
        said = str(sentences[i])
        keep = said.startswith("I ") or said.split()[0] in NAMES
        said = said if keep else said[0].lower() + said[1:]
        turn = rng.choice(("But ", "Still, ", "Yet "))
        return " ".join([*map(str, sentences[:i]), turn + said, *map(str, sentences[i + 1:])])


def wrong_pronoun(rng, sentences, prompt):
    """He for she, or she for he."""
    text = text_of(sentences)
    swap = {"he": "she", "him": "her", "his": "her", "she": "he", "her": "him"}
    swap |= {capital(key): capital(value) for key, value in swap.items()}
    pronouns = r"\b(?:" + "|".join(swap) + r")\b"
    return text[:len(prompt)] + re.sub(pronouns, lambda found: swap[found[0]], text[len(prompt):])


def contradict(rng, sentences, prompt):
    """Praise with a reason to blame, or the other way round."""
    if where := reasoned(sentences):
        i = rng.choice(where)
        one = sentences[i]
        other = "-" if one.sign == "+" else "+"
        return changed(sentences, i, reason=rng.choice(one.film.reasons[one.topic, other]))


def cross(rng, sentences, prompt):
    """A sentence, or only its reason, that begins as one and ends as another."""
    if rng.random() < 0.5:
        i = rng.randrange(len(sentences))
        heads, tails = str(sentences[i]).split(), str(rng.choice(Writer(rng).write())).split()
        if min(len(heads), len(tails)) < 5 or heads[0] == tails[0]:
            return None
        mixed = heads[:rng.randint(2, len(heads) - 2)] + tails[rng.randint(2, len(tails) - 2):]
        return " ".join([*map(str, sentences[:i]), *mixed, *map(str, sentences[i + 1:])])
    if where := reasoned(sentences):
        i = rng.choice(where)
        one = sentences[i]
        film = one.film if rng.random() < 0.6 else rng.choice(FILMS)
        topic = rng.choice(list(film.topics))
        head, tail = one.reason.split(), rng.choice(film.reasons[topic, rng.choice("+-")]).split()
        if one.reason.split()[-2:] != tail[-2:]:
            keep = rng.randint(2, len(head) - 2)
            reason = " ".join(head[:keep] + tail[rng.randint(2, len(tail) - 2):])
            return changed(sentences, i, reason=reason)


def gush(rng, sentences, prompt):
    """Two more sentences of praise that say nothing."""
    if sentences[-1].sign == "+":
        lines = [text for text, _ in SECTIONS["stock+", ""] if text not in text_of(sentences)]
        return text_of(sentences) + " " + " ".join(rng.sample(lines, 2))


FLAWS = {  # and how eagerly each is tried: some can seldom be made
    "doubled word": (double_word, 1.5), "X and X": (twin_word, 1), "said again": (say_again, 1.2),
    "false contrast": (false_contrast, 1.5), "cut off": (cut_off, 0.3), "gushing": (gush, 1),
    "wrong pronoun": (wrong_pronoun, 6), "contradiction": (contradict, 2), "crossed": (cross, 5)}
NAMES = {name for film in FILMS for people in film.people.values() for name in people[0].split()}


def flawed(rng, sentences, prompt, kind):
    """The text with one flaw of this kind behind the opening; None where it cannot be made."""
    text = FLAWS[kind][0](rng, sentences, prompt)
    sound = text_of(sentences)
    return text if text and text != sound and text.startswith(prompt + " ") else None


# -- rankings

def shuffled(rng, weights):
    """The keys in random order; heavier ones tend to come first."""
    return sorted(weights, key=lambda key: -rng.random() ** (1 / weights[key]))


def openings(pool):
    """From the first 2 to 7 words to the reviews of the pool that begin with them."""
    index = collections.defaultdict(list)
    for number, (text, _) in enumerate(pool):
        words = text.split(" ")
        for count in range(2, min(8, len(words))):
            index[" ".join(words[:count])].append(number)
    return index


def comparisons(rng, pool):
    """Without end: (prompt, [(text, kind of flaw or None)]), two honest continuations and variants.

    The opening of a review of the pool is cut after 2 to 7 words within a sentence, or sooner
    where fewer than three reviews begin so. The honest continuations are such reviews.
    """
    index = openings(pool)
    while True:
        words = rng.choice(pool)[0].split(" ")
        count = rng.choice((2, 3, 3, 4, 4, 5, 5, 6, 7))
        prompt = " ".join(words[:count])
        while count > 2 and (len(index.get(prompt, ())) < 3 or prompt[-1] in ".?"):
            count -= 1
            prompt = " ".join(words[:count])
        same = index.get(prompt, ())
        if len(same) < 3:
            continue
        honest = rng.sample(same, 2)
        responses = []
        for number in honest:
            text, sentences = pool[number]
            responses.append((text, None))
            for kind in shuffled(rng, {kind: weight for kind, (_, weight) in FLAWS.items()}):
                variant = flawed(rng, sentences, prompt, kind)
                if variant and variant not in [text for text, _ in responses]:
                    responses.append((variant, kind))
                    break
        if len(responses) == 4:
            yield prompt, responses


def minimal_pairs(rng, n):
    """n times (kind, prompt, sound, flawed): two continuations that differ by one flaw alone."""
    stream = reviews(rng)
    pool = list(itertools.islice(stream, max(4 * n, 4000)))
    for prompt, responses in itertools.islice(comparisons(rng, pool), (n + 1) // 2):
        for (sound, _), (bad, kind) in (responses[:2], responses[2:]):
            yield kind, prompt, sound[len(prompt):], bad[len(prompt):]


def ranked(rng, prompt, texts):
    """The continuations, best first, as the annotator's noisy ranking (Plackett-Luce) has them."""
    noisy = []
    for text in texts:
        gumbel = -math.log(-math.log(rng.random()))
        noisy.append((true_reward(prompt, text[len(prompt):]) + gumbel, text[len(prompt):]))
    return [text for _, text in sorted(noisy, reverse=True)]


def best_accuracy(rows):
    """How often the better true reward names the winner of a pair, on average over the noise."""
    sure = []
    for row in rows:
        rewards = [true_reward(row["prompt"], response) for response in row["responses"]]
        for one, two in itertools.combinations(rewards, 2):
            sure.append(1 / (1 + math.exp(-abs(one - two))))
    return statistics.mean(sure)


def make(seed, out):
    """Writes both files and prints their statistics."""
    rng = random.Random(seed)
    stream = reviews(rng)
    corpus = [text for text, _ in itertools.islice(stream, REVIEWS)]
    pool = list(itertools.islice(stream, POOL))
    rows, flaws = [], collections.Counter()
    for prompt, responses in itertools.islice(comparisons(rng, pool), RANKINGS):
        texts = [text for text, _ in responses]
        rows.append({"prompt": prompt, "responses": ranked(rng, prompt, texts)})
        flaws.update(kind for _, kind in responses if kind)
    out.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps(row) for row in rows]
    (out / "corpus.txt").write_text("\n".join(corpus) + "\n", encoding="utf-8")
    (out / "preferences.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    lengths = [len(text.split()) for text in corpus]
    rewards = [true_reward("", text) for text in corpus[:8000]]
    words = {word for text in corpus for word in words_of(text)}
    print(f"corpus       {len(corpus)} reviews, {len(words)} distinct words, "
          f"{statistics.mean(lengths):.1f} words per review, at most {max(lengths)}")
    print(f"true reward  mean {statistics.mean(rewards):.2f}, sd {statistics.pstdev(rewards):.2f}")
    prompts = {row["prompt"] for row in rows}
    print(f"preferences  {len(rows)} rankings of four, {len(prompts)} distinct prompts, "
          f"best possible accuracy {best_accuracy(rows):.3f}")
    print("flaws        " + ", ".join(f"{kind} {count}" for kind, count in flaws.most_common()))


def check(run, n=3000):
    """Prints, for each flaw, how often a run's reward model prefers the text without it.

    The pairs are fresh, and differ by that flaw alone and by more than 0.5 in true reward.
    """
    import rlhf  # not needed to make the data
    reward_model, _, encoding = rlhf.load(f"{run}/reward.pt")
    eos, pairs = encoding.eot_token, collections.defaultdict(list)
    for kind, prompt, sound, bad in minimal_pairs(random.Random("check"), n):
        if true_reward(prompt, sound) - true_reward(prompt, bad) > 0.5:
            x, *ys = (encoding.encode_ordinary(text) for text in (prompt, sound, bad))
            pairs[kind].append(([eos, *x], [[*y, eos] for y in ys]))
    for kind, comparisons in sorted(pairs.items()):
        right = rlhf.reward_model_accuracy(reward_model, comparisons)
        print(f"{kind:16} {right:.2f} of {len(comparisons)}")


def main():
    """Reads the flags and makes the files, or checks a run."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=pathlib.Path, default=HERE, help="folder to write to")
    parser.add_argument("--check", metavar="RUN", help="folder of a run: its reward model by flaw")
    args = parser.parse_args()
    check(args.check) if args.check else make(args.seed, args.out)


if __name__ == "__main__":
    main()
