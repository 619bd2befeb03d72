"""The simulated annotator: a known, noisy judge of short movie reviews.

Nobody was asked anything. This file *is* the annotator whose preferences `preferences.jsonl` holds,
so the true reward of any text can be computed:

    P(a is preferred over b) = sigmoid(true_reward(prompt, a) - true_reward(prompt, b))

(Bradley and Terry, 1952), which makes the unit of `true_reward` the logit. It wants what an editor
of a film page may want: specific and varied praise, concrete details, no contradiction, no
repetition, a proper end, neither a stub nor a ramble. It knows words, not meaning, and it is
bounded: `true_reward` is a sum of the terms in `TERMS`, each a small function of the same `Text`.

Training never sees this file's scores; it is used to label pairs and to evaluate.

    >>> round(true_reward("The acting", " is superb, and the river crossing is moving."), 1)
    5.0
"""

import math
import re

# Praise and blame, by what they are said of. The generator of the corpus draws from the same lists.
PRAISE = {
    "story": "clever gripping rewarding absorbing compelling satisfying",
    "acting": "superb moving tender convincing graceful subtle",
    "look": "gorgeous vivid luminous beautiful striking",
    "sound": "lovely haunting stirring beautiful soaring",
    "pace": "brisk assured taut confident graceful",
    "wit": "funny clever witty warm charming",
    "action": "thrilling exciting dazzling daring",
    "scene": "moving thrilling magical touching unforgettable",
    "film": "wonderful superb charming brilliant delightful memorable",
    "noun": "joy gem wit grace charm treat magic warmth beauty delight triumph pleasure "
            "conviction tenderness intelligence",
    "verb": "shine shines shone soar soars soared charm charms charmed delight delights "
            "delighted dazzle dazzles dazzled captivate captivates captivated reward rewards "
            "impress impresses impressed thrill thrills thrilled love loved loves admire "
            "admired adored moved recommend worth applauded",
    "adverb": "beautifully brilliantly wonderfully vividly cleverly",
}
BLAME = {
    "story": "thin flimsy muddled contrived pointless lazy predictable",
    "acting": "wooden flat stiff bland lifeless awkward",
    "look": "drab murky ugly cheap dingy",
    "sound": "tinny grating cloying droning forgettable",
    "pace": "sluggish choppy plodding tedious",
    "wit": "stale unfunny corny strained tiresome",
    "action": "clumsy messy feeble numbing",
    "scene": "clumsy rushed baffling laughable",
    "film": "dull dreary boring tedious forgettable disappointing",
    "noun": "mess bore chore slog dud waste tedium ordeal failure letdown cliches nonsense "
            "disappointment boredom",
    "verb": "drag drags dragged sag sags bores bored stumble stumbles grate grates fizzle "
            "fizzles falter falters fails wastes wasted annoy annoys annoyed disappoint "
            "disappoints disappointed ramble rambles collapse collapses hated yawned dozed "
            "regret skip avoid",
    "adverb": "badly clumsily feebly lazily",
}
# Concrete details: what a review can name. A person's surname counts, the word "film" does not.
ASPECTS = """
    act acting animation arguments backgrounds banter battles camerawork candlelight cast
    characters chases chemistry children choruses clues colors conversations costumes creaking
    crew dancing desert design dialogue direction double drums editing effects ending fights
    finale flashbacks fog frights gags gunfights gunfire history hour humor interiors intrigue
    jokes kitchen landscapes leads lighting music mystery narration noise opening pacing
    performances photography piano plan plot premise quarrels radio rhythm rivalry roles scenes
    science score screenplay script sets side smaller songs soundtrack storm story strings stunts
    summer supporting suspense theme training trenches trial tune twist ups villain voices waves
    wind witnesses
"""
PEOPLE = """
    agent ambassador analyst apprentice army aunt bailiff baker bank banker beekeeper bell
    blacksmith bookbinder border boss botanist bounty breaker bride bridegroom bridesmaid broker
    brother bugler butcher butler cabin captain caretaker caterer cattle cello champion chaplain
    chef chess chief choir chorus circus clerk clock clockwork clown club coach colonel conductor
    constable contest cook corner coroner county courier court cousin cracker cream critic crow
    dairy dancer daughter dealer defendant defender delivery dentist deputy detective dishwasher
    diver doctor doorman dragon dressmaker driver drover drummer editor elevator embassy engineer
    farmer father ferry ferryman florist foreman forensic forger fortune gardener getaway giant
    goose governess grandfather grandmother guard gym hacker harbor headmaster heiress herder
    hitchhiker horse hotel housekeeper informer inspector instructor insurance jewel judge juror
    jury keeper kite knight landlord lieutenant lighthouse locksmith magician manager map mate
    mayor mechanic medic mender miller mother museum navigator neighbor noodle nurse officer
    operator oyster painter parish partner pastry pearl phone photographer pianist pickpocket
    pilot player preacher priest principal prisoner producer promoter prosecutor queen referee
    repair reporter restaurant ringer robot salesman school secretary security seller sergeant
    shepherd sheriff ship signal singer sister smuggler son soprano sparring stable stagehand
    state station stepfather stepmother stowaway student tax taxi teacher technician teenage
    telegraph teller thief ticket trader train trainer translator trooper trucker tuner twin
    understudy undertaker village waiter waitress walker watchman wedding welterweight widow
    witness wolf
"""
PLACES_AND_SCENES = """
    aboard airlock airport alley apartment arena argument arrival attic auction audition august
    bakery ball bar bargain barn basement bath birthday blackout booth bowling box breakdown
    breakfast brick bridge burial cable cafe cake call camp camper campfire candle canteen canyon
    capital car casino castle cellar chase church circuit climb clocks coal coast confession
    courthouse crossing curtain dance dawn deck depot diner dinner disaster discovery district
    divided docking docks drawing dressing drive duet escape examination factory fairground
    farewell farm feast fire fishing flight flood flower forest funeral gallows game garage garden
    gas graves greenhouse highway hill hospital houses interrogation island jazz kingdom kiss
    knife knock knockout lake landing lesson letter library locker lunch manor march market
    message midnight mills moon moor morgue motel motels mountain mutiny nursery orbit orchard
    park parrot patrol pawnshop pier planet planning polygraph prison provincial puppet raid
    railroad rain rainy ranch reading reef rehearsal rescue resort retreat reunion ride river
    roadside rocky roof roofs rooftop round salt saturn sea seance seaside shootout shop sleeper
    snow soup spa speech staircase stampede steamer suitcases supper table tasting testimony
    theater toast toll tournament tower toys tram trench trip truce trunk tunnel university van
    vault verdict vineyard violin vote waiters warehouse weigh well whale whaling windmills
    windows
"""
SURNAMES = """
    Vale Marsh Holt Lund Reyes Hale Pike Nash Sand Novak Quill Gallo Dunne Brandt Moreau Kessler
    Larkin Santos Voss Ferris Tanaka Okafor Sorel Varga
"""
CONTRAST = re.compile(r"\b(?:but|although|though|yet|still|however|even (?:so|if|though)|despite|"
                      r"while|whereas|except|that said|all the same|on the other hand|for all)\b")
NEGATORS = frozenset("""not never no nor hardly barely neither nobody nothing none without cannot
    isn't wasn't aren't weren't don't doesn't didn't can't couldn't won't""".split())
FUNCTION = frozenset("""a an the this that these those and or but yet so as if than then while
    although though because since when where who whom which what how why is are was were be been
    being has have had does do did will would can could may might must should i we you he she it
    they me us him her them my our your his its their one of in on at to for from with by about
    into over under after before during through between near behind above only very quite rather
    really too even still also just more most less least much many few all both each made
    something nothing everything plays gives sets keeps makes gets says looks feels love every
    long however any some there here up down out off again once twice""".split())

VOWELS = re.compile(r"\b(?:a (?=(?!uni|use|one|eu)[aeiou])|an (?=[bcdfgjklmnpqrstvwxyz]))")
BROKEN = re.compile(
    r"\b(?:the|an?|my|our)[ ,]+"
    r"(?:is|are|was|and|but|the|an?|of|who|it|s?he|in|at|to|with|which|i|we)\b"
    r"|\b(?:the|an?|and|but|of|my|our|with|or)[.!?,]")
SENTENCE = re.compile(r"[^.!?]+[.!?]*")
WORD = re.compile(r"[a-z0-9]+(?:'[a-z]+)?|[,;:]")


def _lemma(word):
    """One key for the forms of a verb: "charms", "charmed" and "charm" are praised once."""
    for suffix in ("ed", "es", "s", "d"):
        stem = word.removesuffix(suffix)
        if word in VERB_FORMS and stem != word and len(stem) > 2:
            return stem.rstrip("e")
    return word.rstrip("e") if word in VERB_FORMS else word


VERB_FORMS = frozenset((PRAISE["verb"] + " " + BLAME["verb"]).split())
GOOD = {word: _lemma(word) for words in PRAISE.values() for word in words.split()}
BAD = {word: _lemma(word) for words in BLAME.values() for word in words.split()}
DETAILS = frozenset((ASPECTS + PEOPLE + PLACES_AND_SCENES + SURNAMES).lower().split())
assert not GOOD.keys() & BAD.keys() and not (GOOD.keys() | BAD.keys()) & DETAILS

FLOOR, EMPTY = -11.0, -12.0  # no text scores less than FLOOR, but an empty response does


class Text:
    """What the annotator sees in a text, counted once for all terms.

    `praise` and `vague_praise`: distinct praising words in sentences with and without a concrete
    detail; `blame`: blaming words; `details`: distinct details; `signs`: the balance of each
    sentence, and whether it holds a word of contrast; `content`: all content words in order.
    """

    def __init__(self, text):
        self.text, self.words = text.strip(), []
        self.sentences = [s.strip() for s in SENTENCE.findall(self.text) if s.strip()]
        self.praise, self.vague_praise, self.blamed = set(), set(), {}
        self.details, self.signs, self.content = set(), [], []
        self.salad = self.doubled = self.clash = self.piled = 0
        for sentence in self.sentences:
            self._read(sentence.lower())

    def _read(self, sentence):
        """Adds what one sentence says."""
        tokens = WORD.findall(sentence)
        words = [t for t in tokens if t not in ",;:"]
        content = [w for w in words if w not in FUNCTION and w not in NEGATORS]
        good, bad = self._judged(tokens)
        self.words += words
        self.content += content
        self.doubled += sum(a == b for a, b in zip(words, words[1:]))
        contrast = CONTRAST.search(sentence) is not None
        if len(words) >= 4 and len(content) > .8 * len(words):
            self.salad += 1  # a list of words is no sentence: its praise and details are not heard
            good = []
        else:
            found = DETAILS.intersection(content)
            (self.praise if found else self.vague_praise).update(good[:3])
            self.details |= found
        self.piled += max(len(good) - 3, 0)
        for word in bad:
            self.blamed[word] = self.blamed.get(word, 0) + 1
        if good and bad and not contrast:
            self.clash += 1
        self.signs.append(((len(good) > len(bad)) - (len(good) < len(bad)), contrast))

    @staticmethod
    def _judged(tokens):
        """Praising and blaming words; a negator up to three words before swaps the two."""
        good, bad, negated = [], [], 0
        for token in tokens:
            if token in NEGATORS:
                negated = 8 if token == "nothing" else 4  # "nothing about the plot is dull"
            elif token in (",", ";", ":", "but"):
                negated = 0
            elif token in GOOD:
                (bad if negated > 0 else good).append(GOOD[token])
            elif token in BAD:
                (good if negated > 0 else bad).append(BAD[token])
            negated -= 1
        return good, bad


def saturate(x, top, scale):
    """Grows like top * x / scale at first and never beyond `top`: diminishing returns."""
    return top * (1.0 - math.exp(-x / scale))


def praise(t):
    """Distinct praising words; in a sentence that names a detail they count in full."""
    return saturate(len(t.praise) + .45 * len(t.vague_praise - t.praise), 8.0, 3.2)


def details(t):
    """Distinct concrete details: aspects, scenes, places, people."""
    return saturate(len(t.details), 2.4, 4.0)


def blame(t):
    """Every blaming word costs; a word that is repeated costs once more at most."""
    return -saturate(sum(min(n, 2) for n in t.blamed.values()), 6.5, 2.4)


def coherence(t):
    """Praise against blame without a word of contrast, in a sentence or from one to the next."""
    cost, last = 1.0 * t.clash, 0
    for sign, contrast in t.signs:
        if sign * last < 0 and not contrast:
            cost += 1.3
        last = sign or last
    return -min(cost, 3.0)


def gushing(t):
    """Praise piled up: every praising word of a sentence after its third costs."""
    return -min(.9 * t.piled, 4.0)


def ending(t):
    """A text that stops in the middle of a sentence."""
    return 0.0 if t.text[-1:] in (".", "!", "?") else -2.2


def repetition(t):
    """Content words, word pairs and sentences that come back; a word twice in a row."""
    n = max(len(t.content), 1)
    again = 1 - len(set(t.content)) / n
    pairs = list(zip(t.words, t.words[1:]))
    pair_again = 1 - len(set(pairs)) / max(len(pairs), 1)
    same = len(t.sentences) - len({s.lower() for s in t.sentences})
    cost = 12 * max(again - .45, 0) + 4 * max(pair_again - .5, 0) + .7 * (same + t.doubled)
    return -min(cost, 6.5)


def length(t):
    """A stub of fewer than 8 words, or a ramble of more than 40."""
    n = len(t.words)
    return -min(.45 * max(8 - n, 0) + .22 * max(n - 40, 0), 12.0)


def grammar(t):
    """Sentences without a capital, a wrong "a" or "an", broken word order, word salad."""
    small = sum(not s[0].isupper() for s in t.sentences)
    lower = t.text.lower()
    broken = len(BROKEN.findall(lower)) + len(VOWELS.findall(lower))
    return -min(1.0 * small + .9 * broken + 2.0 * t.salad, 4.0)


TERMS = (praise, details, blame, gushing, coherence, ending, repetition, length, grammar)


def join(prompt, response):
    """The text that is judged: prompt and response, with a space between two words."""
    gap = prompt[-1:].isalpha() and response[:1].isalnum()
    return prompt + (" " if gap else "") + response


def true_reward(prompt, response):
    """The annotator's utility of a response to a prompt, in logits; a sum of `TERMS`."""
    if not response.strip():
        return EMPTY
    text = Text(join(prompt, response))
    return max(sum(term(text) for term in TERMS), FLOOR)


def preference_probability(prompt, a, b):
    """The chance that the annotator prefers response a over response b (Bradley-Terry)."""
    gap = true_reward(prompt, a) - true_reward(prompt, b)
    return 1 / (1 + math.exp(-gap)) if gap > -700 else 0.0
