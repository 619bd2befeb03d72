"""Makes the shipped data: corpus.txt, preferences.jsonl and tokenizer.tiktoken, byte for byte.

    python data/make_data.py [--seed 0] [--out DIR]

The world is invented. A grammar written for this project tells short movie reviews; the *simulated*
annotator of `annotator.py` prefers one continuation of an opening over another, with known noise.
The grammar is a left-to-right function of a stream of uniform numbers, each drawn only when the
next words need it. To branch after k words one replays the numbers drawn up to there and goes on
with fresh ones: the same opening, two honest continuations.
"""

import argparse
import base64
import itertools
import json
import math
import pathlib
import random
import re

from annotator import BLAME, PRAISE, SURNAMES, true_reward

REVIEWS, PAIRS, MERGES = 14_000, 18_000, 767
# Most pairs differ clearly in utility, some hardly, few by something between: shares that are kept.
KEPT = ((.2, 1.0), (4.5, .003), (math.inf, .5))
PATTERN = r" ?\p{L}+(?:'\p{L}+)?| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+"  # as in data/dataset.py
ASCII_PATTERN = r" ?[A-Za-z]+(?:'[A-Za-z]+)?| ?[0-9]+| ?[^\sA-Za-z0-9]+|\s+"  # for the stdlib's re

# One world per genre, so that the sentences of a review belong to the same film. `who` are leads,
# `goal` what happens to them, `where` the place, `scene` moments, `other` people beside the lead,
# `also` aspects that only this genre has (number, category, noun phrase).
WORLDS = [
    {"genre": "western|westerns",
     "who": "retired sheriff|cattle drover|traveling preacher|blacksmith|horse trader|"
            "telegraph clerk|bounty hunter",
     "goal": "must drive a herd north before the snow|refuses to sell the last well in the valley|"
             "rides back to settle an old debt|buries a friend and keeps walking|"
             "takes in a runaway boy|stops speaking after a hanging",
     "where": "in a dying railroad town|on the salt flats|near the border|in a canyon camp|"
              "on a failing ranch",
     "scene": "the river crossing|the card game|the shootout at the depot|the burial on the hill|"
              "the campfire talk|the stampede|the walk to the gallows|the barn fire",
     "other": "deputy|widow|banker|stable boy|undertaker",
     "also": "p:action:the gunfights|s:look:the desert light|p:action:the horse chases"},
    {"genre": "thriller|thrillers",
     "who": "night nurse|tax inspector|court translator|train conductor|locksmith|"
            "elevator mechanic|phone operator",
     "goal": "overhears a murder on a crossed line|finds a stranger's passport in a coat|"
             "starts following the wrong man|receives the same letter every week|"
             "witnesses a crash that nobody reports|wakes up with another man's keys",
     "where": "in a hotel by the airport|on a night train|in an empty office tower|"
              "in a parking garage|in a foreign capital",
     "scene": "the chase through the market|the scene in the phone booth|the interrogation|"
              "the fight in the elevator|the search of the apartment|the meeting on the roof|"
              "the blackout|the ride in the trunk",
     "other": "landlord|informer|neighbor|doorman|police chief",
     "also": "s:story:the suspense|p:action:the car chases|s:sound:the city noise"},
    {"genre": "romance|romances",
     "who": "piano tuner|florist|bookbinder|divorced baker|wedding photographer|swimming teacher|"
            "museum guard",
     "goal": "falls for a rival across the street|keeps missing the same bus as a stranger|"
             "writes letters for other people|returns home for one summer|"
             "rents a room to an old flame|agrees to one last dance",
     "where": "in a seaside resort|in a rainy university town|on a vineyard|in a small flower shop|"
              "in an out of season hotel",
     "scene": "the dance on the pier|the first kiss|the breakfast scene|the missed train|"
              "the walk through the orchard|the argument in the rain|the wedding toast|"
              "the farewell at the station",
     "other": "cousin|bridegroom|aunt|grandmother|waiter",
     "also": "s:acting:the chemistry|p:sound:the love songs|s:look:the summer light"},
    {"genre": "comedy|comedies",
     "who": "substitute teacher|driving instructor|wedding caterer|hotel clerk|retired magician|"
            "dog walker|deputy mayor",
     "goal": "loses the mayor's parrot|pretends to be a doctor for a weekend|"
             "inherits a bowling alley|must host two dinners at once|enters a baking contest|"
             "gets locked in a department store",
     "where": "in a bowling alley|at a school reunion|in a crowded apartment house|"
              "at a country wedding|in a garden center",
     "scene": "the dinner party|the parrot chase|the cake disaster|the staircase scene|"
              "the speech at the reunion|the mix-up with the suitcases|the bowling final|"
              "the scene with the two waiters",
     "other": "mother-in-law|bridesmaid|headmaster|delivery boy|judge of the contest",
     "also": "p:wit:the jokes|p:wit:the running gags|s:wit:the banter"},
    {"genre": "war film|war films",
     "who": "young medic|army cook|radio operator|village doctor|supply driver|field chaplain|"
            "map maker",
     "goal": "carries a message across the front|hides two deserters in a cellar|"
             "has to hold a bridge for one night|writes home for men who cannot|"
             "walks back through the forest alone|guards a prisoner on a long march",
     "where": "in a flooded trench|in a bombed village|on a frozen river|near the trenches|"
              "in a field hospital",
     "scene": "the bridge at dawn|the retreat through the snow|the letter scene|the night patrol|"
              "the truce in the church|the air raid|the march past the graves|"
              "the soup line",
     "other": "sergeant|prisoner|farmer's daughter|young lieutenant|bugler",
     "also": "p:action:the battles|s:sound:the gunfire|p:look:the trenches"},
    {"genre": "ghost story|ghost stories",
     "who": "piano teacher|house painter|grieving father|housekeeper|clock maker|young governess|"
            "house agent",
     "goal": "hears footsteps above an empty room|moves into a house with one locked door|"
             "keeps finding wet shoes on the stairs|inherits a mirror and a warning|"
             "rents the attic to nobody|sees a child at the well",
     "where": "in a house on the moor|in a closed boarding school|in an old hotel|"
              "beside a black lake|in a village of shuttered windows",
     "scene": "the seance|the attic scene|the nursery scene|the scene at the well|"
              "the candle scene|the bath scene|the last night in the cellar|the knock at the door",
     "other": "caretaker|priest|twin|fortune teller|old nurse",
     "also": "p:scene:the frights|s:sound:the creaking sound design|s:look:the candlelight"},
    {"genre": "heist film|heist films",
     "who": "safe cracker|getaway driver|jewel thief|museum guide|card dealer|insurance broker|"
            "retired pickpocket",
     "goal": "plans one last robbery|has an hour to empty a vault|trusts the wrong partner|"
             "steals a painting twice|takes a job to pay for a wedding|"
             "digs a tunnel under a bakery",
     "where": "in a casino by the sea|under a city bank|in an auction house|"
              "at a harbor warehouse|in a mountain resort",
     "scene": "the vault scene|the tunnel scene|the getaway|the auction|the rooftop escape|"
              "the planning scene|the double cross|the card table scene",
     "other": "bank manager|forger|security guard|hacker|crew boss",
     "also": "s:story:the plan|p:action:the break-ins|s:acting:the crew"},
    {"genre": "musical|musicals",
     "who": "chorus dancer|street singer|stagehand|dressmaker|night club pianist|bus driver|"
            "opera understudy",
     "goal": "gets one night as the star|writes a song for a stranger|"
             "teaches a factory to dance|has lost a voice and a partner|"
             "saves a theater from the bank|sings only after closing time",
     "where": "in a bankrupt theater|on a summer stage|in a factory town|in a basement club|"
              "behind the curtain of a city opera",
     "scene": "the rooftop number|the audition|the tap dance|the opening night|the duet on the "
     "tram|"
              "the dressing room scene|the final chorus|the rehearsal",
     "other": "producer|rival soprano|choir master|drummer|ticket seller",
     "also": "p:sound:the songs|s:action:the dancing|p:sound:the choruses"},
    {"genre": "family drama|family dramas",
     "who": "widowed farmer|school principal|eldest daughter|truck driver|dairy inspector|"
            "night baker|stepfather",
     "goal": "comes home to sell the farm|has not spoken to a brother in years|"
             "finds a second family in a photograph|must look after a forgetful father|"
             "returns for a funeral and stays|hides a debt from the children",
     "where": "on a dairy farm|in a row of brick houses|in a lake cabin|in a bakery|"
              "in a town after the flood",
     "scene": "the funeral lunch|the kitchen argument|the birthday scene|the drive to the hospital|"
              "the reading of the will|the card game with the father|the fishing trip|"
              "the phone call at night",
     "other": "younger brother|grandfather|stepmother|teenage son|parish priest",
     "also": "p:story:the family quarrels|p:acting:the children|s:story:the family history"},
    {"genre": "space film|space films",
     "who": "cargo pilot|ship's doctor|mining engineer|young botanist|signal officer|"
            "repair technician|station cook",
     "goal": "wakes forty years too late|repairs a station that nobody visits|"
             "hears a voice from an empty ship|has air for nine days|"
             "raises wheat on a dead moon|must choose who sleeps and who steers",
     "where": "on a mining moon|aboard an old cargo ship|on a station above Saturn|"
              "in a greenhouse in orbit|on a planet of ice",
     "scene": "the docking scene|the walk outside the ship|the signal from the moon|"
              "the greenhouse fire|the storm on the ice|the airlock scene|the landing|"
              "the last message home",
     "other": "captain|navigator|robot|stowaway|mission chief",
     "also": "p:look:the effects|p:look:the ship interiors|s:story:the science"},
    {"genre": "courtroom drama|courtroom dramas",
     "who": "public defender|court reporter|young prosecutor|juror|county judge|law student|"
            "expert witness",
     "goal": "takes a case that nobody wants|doubts the only witness|"
             "must defend an old teacher|finds a missing page in the file|"
             "knows the verdict is wrong|has one night to change eleven minds",
     "where": "in a county courthouse|in a jury room in August|in a prison visiting room|"
              "in a coal town|in a provincial court",
     "scene": "the cross-examination|the verdict|the jury vote|the scene in the judge's office|"
              "the closing speech|the prison visit|the search for the knife|"
              "the testimony of the mother",
     "other": "bailiff|defendant|star witness|jury foreman|reporter",
     "also": "p:story:the arguments|p:story:the trial scenes|p:acting:the witnesses"},
    {"genre": "boxing film|boxing films",
     "who": "aging trainer|young welterweight|corner man|gym owner|referee|night watchman|"
            "fight promoter",
     "goal": "gets a title fight by accident|comes back after nine years|"
             "trains the daughter of a rival|has promised never to box again|"
             "hides an injury from the doctor|must lose one fight to win another",
     "where": "in a basement gym|in a harbor district|in a town of closed mills|"
              "on the fairground circuit|in a crowded arena",
     "scene": "the final round|the weigh-in|the training run|the locker room speech|"
              "the first knockout|the hospital visit|the sparring match|the scene on the docks",
     "other": "manager|champion|ring doctor|sparring partner|coach",
     "also": "p:action:the fights|s:sound:the crowd noise|p:action:the training scenes"},
    {"genre": "detective film|detective films",
     "who": "private detective|hotel detective|police clerk|forensic dentist|crime reporter|"
            "village constable|night editor",
     "goal": "looks for a missing violinist|opens a case closed long ago|"
             "is hired by the murderer|follows a trail of pawn tickets|"
             "finds the same rose at each crime|must clear an old partner",
     "where": "in a foggy harbor city|in a country manor|in a jazz district|"
              "on a river steamer|in a mountain spa",
     "scene": "the library scene|the confession|the pawnshop scene|the chase over the roofs|"
              "the drawing room meeting|the morgue scene|the night at the docks|"
              "the discovery of the violin",
     "other": "butler|heiress|coroner|gardener|police captain",
     "also": "s:story:the mystery|p:story:the clues|s:look:the fog"},
    {"genre": "road movie|road movies",
     "who": "traveling salesman|runaway bride|truck stop waitress|circus clown|ice cream seller|"
            "beekeeper|hitchhiker",
     "goal": "drives a hearse across the country|has a week to reach the coast|"
             "picks up a boy with a cello|sells the house and starts the van|"
             "delivers a piano to a lighthouse|follows a circus that keeps moving",
     "where": "on a desert highway|at a row of gas stations|in a camper van|"
              "along the northern coast|in a string of roadside motels",
     "scene": "the diner scene|the breakdown in the desert|the motel night|the ferry ride|"
              "the gas station argument|the scene at the toll booth|the night under the bridge|"
              "the arrival at the sea",
     "other": "mechanic|trucker|cello player|state trooper|sister",
     "also": "p:look:the landscapes|s:sound:the radio soundtrack|p:story:the stops on the way"},
    {"genre": "sea story|sea stories",
     "who": "lighthouse keeper|ferry captain|ship's cook|pearl diver|harbor pilot|net mender|"
            "customs officer",
     "goal": "signals to a ship that never comes|sails into the ice to find a brother|"
             "pulls a stranger out of the water|refuses to leave the sinking island|"
             "smuggles a child across the strait|keeps a log of every wave",
     "where": "in a fishing village|on a rocky island|aboard a whaling ship|"
              "in a lighthouse|in a northern harbor",
     "scene": "the storm|the rescue at the reef|the whale scene|the mutiny|"
              "the climb up the lighthouse|the burial at sea|the scene below deck|"
              "the return to the harbor",
     "other": "first mate|smuggler|cabin boy|harbor master|old ferryman",
     "also": "p:look:the waves|s:sound:the wind|p:look:the storm scenes"},
    {"genre": "fable|fables",
     "who": "shepherd girl|clockwork knight|kite maker|royal gardener|goose herder|young giant|"
            "bell ringer",
     "goal": "trades a shadow for a horse|must guard the last winter apple|"
             "climbs a mountain to wake the sun|befriends a shy dragon|"
             "carries the king's dream in a jar|learns the language of crows",
     "where": "in a kingdom of windmills|in an enchanted forest|on a flying island|"
              "in a village under the ice|in a castle of clocks",
     "scene": "the dragon's lesson|the feast in the forest|the flight over the windmills|"
              "the puppet show|the bell tower scene|the bargain with the crow|the frozen lake|"
              "the march of the toys",
     "other": "dragon|crow|queen|miller|wolf",
     "also": "s:look:the animation|p:acting:the voices|p:look:the backgrounds"},
    {"genre": "spy film|spy films",
     "who": "embassy driver|code breaker|retired courier|chess player|opera critic|"
            "border guard|photo analyst",
     "goal": "defects on the wrong night|delivers a film hidden in a shoe|"
             "must unmask an old friend|teaches chess to the enemy|"
             "waits at a cafe for a dead contact|swaps briefcases by mistake",
     "where": "in a divided city|in an embassy in the snow|on a sleeper train|"
              "at a chess tournament|in a cafe near the wall",
     "scene": "the exchange on the bridge|the chess match|the embassy ball|the cable car chase|"
              "the polygraph scene|the drop in the park|the border crossing|"
              "the scene in the opera box",
     "other": "ambassador|double agent|secretary|colonel|taxi driver",
     "also": "s:story:the intrigue|p:story:the double crosses|p:action:the chases on foot"},
    {"genre": "kitchen drama|kitchen dramas",
     "who": "pastry cook|dishwasher|head waiter|food critic|oyster seller|noodle maker|"
            "cooking teacher",
     "goal": "opens a restaurant in a garage|has one week before the inspectors come|"
             "cooks for a father who left|loses the sense of taste|"
             "trades recipes with a prisoner|must feed a strike",
     "where": "in a noodle bar|in a hotel kitchen|on a market street|in a prison canteen|"
              "in a harbor restaurant",
     "scene": "the soup scene|the midnight supper|the market scene|the burned dinner|"
              "the tasting|the strike at the restaurant|the lunch rush|the last table",
     "other": "apprentice|sous chef|restaurant owner|butcher|inspector",
     "also": "s:look:the food photography|s:sound:the kitchen noise|s:story:the rivalry"},
]
# Aspects that any film has: number, category (which adjectives fit), noun phrase.
ASPECTS = """
s:story:the plot|s:story:the script|s:story:the story|s:story:the ending|s:story:the dialogue|
s:story:the premise|s:story:the screenplay|s:story:the last act|s:story:the middle act|
s:story:the twist|s:story:the narration|p:story:the flashbacks|p:story:the conversations|
s:acting:the acting|s:acting:the cast|s:acting:the supporting cast|p:acting:the performances|
p:acting:the leads|p:acting:the smaller roles|s:acting:the villain|
s:look:the photography|s:look:the camerawork|s:look:the lighting|p:look:the costumes|
p:look:the sets|p:look:the colors|p:look:the close-ups|p:look:the night scenes|s:look:the design|
s:sound:the score|s:sound:the music|s:sound:the sound design|s:sound:the piano theme|
s:sound:the theme tune|p:sound:the drums|p:sound:the strings|
s:pace:the pacing|s:pace:the editing|s:pace:the rhythm|s:pace:the first hour|
s:pace:the opening|s:pace:the direction|
s:wit:the humor|p:wit:the one-liners|p:wit:the side characters|
p:action:the stunts|s:action:the finale|p:action:the crowd scenes
"""
MILD = {
    "story": "decent simple familiar conventional passable tidy straightforward serviceable busy "
             "ordinary",
    "acting": "competent adequate steady restrained acceptable reliable professional",
    "look": "plain decent tidy functional modest ordinary adequate unremarkable",
    "sound": "pleasant quiet adequate ordinary modest sparse conventional",
    "pace": "steady even unhurried leisurely acceptable measured regular",
    "wit": "mild gentle old-fashioned harmless broad uncomplicated",
    "action": "competent decent ordinary standard brief acceptable",
    "scene": "decent brief watchable ordinary quiet familiar long",
    "film": "decent passable watchable ordinary modest respectable average serviceable "
            "unremarkable",
}
# Verb phrases, singular/plural, by polarity and category ("any" fits every aspect).
PHRASES = {
    "+": {"any": "impresses/impress|delights/delight|charms/charm from the start|"
                 "captivates/captivate|rewards/reward close attention|shines/shine",
          "look": "dazzles/dazzle|shines/shine in every frame",
          "sound": "soars/soar|thrills/thrill|charms/charm the ear",
          "acting": "shines/shine|dazzles/dazzle|charms/charm without effort|soars/soar",
          "action": "thrills/thrill|dazzles/dazzle|delights/delight the whole room",
          "wit": "charms/charm|delights/delight at every turn"},
    "0": {"any": "does/do the job|gets/get by|holds/hold up well enough|comes and goes/come and go|"
                 "does/do what you expect|neither helps nor hurts/neither help nor hurt|"
                 "stays/stay in the background|passes/pass the time",
          "acting": "does/do the work|keeps/keep a straight face|gets/get through it",
          "story": "covers/cover the usual ground|gets/get where you expect|"
                   "follows/follow the rules"},
    "-": {"any": "grates/grate after ten minutes|disappoints/disappoint|annoys/annoy|"
                 "falters/falter early|fails/fail completely",
          "story": "drags/drag|rambles/ramble|sags/sag in the middle|"
                   "collapses/collapse under questions|fizzles/fizzle out|goes/go nowhere",
          "pace": "drags/drag|sags/sag after an hour|stumbles/stumble|falters/falter",
          "wit": "fizzles/fizzle|falls flat/fall flat|grates/grate",
          "acting": "falters/falter|falls flat/fall flat|disappoints/disappoint",
          "action": "fizzles/fizzle|bores/bore|falls flat/fall flat|drags/drag",
          "look": "disappoints/disappoint|annoys/annoy|bores/bore the eye"},
}
FEMALE = "Mara Nora Ada Lena Ruth Clara Iris Vera Rosa June"
MALE = "Ivan Leon Hugo Omar Nils Felix Theo Anton Emil Walter"
# Parts that only a woman, or only a man, plays: their last words.
HERS = set("""widow aunt grandmother bridesmaid queen heiress daughter mother-in-law stepmother
    soprano sister girl bride waitress governess""".split())
HIS = set("""bridegroom boy waiter landlord doorman butler grandfather brother son ferryman
    headmaster priest father stepfather salesman watchman""".split())
TITLE = ("Glass Salt Winter Paper Silver Hollow Northern Second Burning Silent Distant Borrowed "
         "Crooked Scarlet Hidden Broken",
         "Orchard Ferry Lantern Promise Window Harvest Horizon Stranger Garden Bridge River Season "
         "Parade Signal Hour Kingdom")
FILM = "film|film|movie|picture"
TONE = ("small|quiet|long|short|modest|low budget|talkative|strange|serious|loud|sunny|dark|"
        "black and white|old-fashioned|independent|grown-up|sentimental|deadpan")
WHEN = ("on a wet Sunday|last night|at a matinee|late on a Tuesday|on a long flight|in one sitting|"
        "at the old cinema in town|during a snow day|at a festival|in a half empty theater|"
        "on my birthday|after a long shift|at an outdoor screening|on a hotel television|"
        "over two evenings")
WITH = ("with my sister|alone|with two friends|with my father|with an old friend|"
        "with a loud crowd|with the children|with my neighbor|with colleagues|with my book club|"
        "with my grandmother|with a bag of oranges")
VIEWER = "sister:she|father:he|neighbor:she|brother:he|wife:she|husband:he|roommate:he|boss:she"
SECONDS = ("twenty minutes|half an hour|the first hour|ten minutes|three scenes|the first reel|"
           "forty minutes")
# Sentence templates by rhetorical kind. [a|b] is a free choice; <praise//mild//blame> is a choice
# by the polarity of the sentence, which is drawn where it is first needed; {slot} is filled by
# Review.slot. NEXT says which kinds may begin a review.
TEMPLATES = {
    "context": [
        "[I|we] [saw|watched|caught] this {tone} {film} {when} {with}, <and [nobody spoke on the "
        "way home|it was a delight|the whole room applauded|I loved {aspect}|it was worth the "
        "trip]//and [it passed the time|it was fine|nobody complained|that was about right]//and "
        "[it was a chore|half of us dozed|I regret the evening|the popcorn was better|it was a "
        "bore]>.",
        "I [went in|sat down] expecting [a|the usual] {genre} and got <{advb} {made} [drama|"
        "entertainment|storytelling]//[pretty much that|exactly that|a little less|a little "
        "more]//[two hours of boredom|a long slog|a mess|a pile of cliches]>.",
        "my {viewer} [picked|chose|suggested] this {genre}, and <{vhe} was right: {aspect} {is} "
        "{adj}//{vhe} was half right, since {aspect} {is} {adj}//I am still annoyed, because "
        "{aspect} {is} {adj}>.",
        "I watched {title} {when}, <and {aspect} {is} still with me, {adj} and {adj}//and "
        "{aspect} {is} about all I remember//and {aspect} nearly made me leave>.",
        "after {seconds} I [was|knew that I was] <in good hands: {aspect} {is} {adj}//neither "
        "happy nor angry, because {aspect} {is} {adj}//ready to go home, because {aspect} {is} "
        "{adj}>.",
        "the audience [at my screening|around us|in our row] <[applauded|cheered|went very "
        "quiet] during {scene}, which is {adj:scene}//[coughed a little|stayed polite] during "
        "{scene}, which is {adj:scene}//[yawned|laughed in the wrong places] during {scene}, "
        "which is {adj:scene}>.",
        "{title} opened here [last week|in May|without much noise|on a Friday|this spring], and "
        "<I have told everyone about {aspect}//I have no strong opinion about {aspect}//I have "
        "already forgotten {aspect}>.",
    ],
    "setup": [
        "{title}, the [first|second|third] {film} by {director}, follows {arole} who {goal}.",
        "a {genre} about {arole} {where} is [nothing new|an odd idea|not what I expected].",
        "here is a {genre} with {arole} who {goal}.",
        "{arole} and {other} [share a secret|share a room|meet by chance|do not get along] "
        "{where}.",
        "this {tone} {genre} follows {arole} who {goal}.",
        "{title} is about {arole} who {goal}.",
        "in {title}, {arole} {goal}.",
        "the story follows {arole} {where} who {goal}.",
        "it all begins {where}, where {arole} {goal}.",
        "{arole} {goal}, and [that is only the beginning|the rest follows from there|everything "
        "goes wrong after that|nobody believes it].",
        "{director} sets this {genre} {where}.",
        "[most|all|nearly all] of {title} takes place {where}, where {lead} plays {arole}.",
        "{lead} plays {arole} who {goal}.",
        "imagine {arole} who {goal}, and you have the [first half|plot|premise] of {title}.",
    ],
    "plays": [
        "{lead} plays {arole} {where}, and {he} is <{adj:acting} and {adj:acting}//{adj:acting}, "
        "[no more|nothing else]//{adj:acting} [from start to end|throughout|in every scene]>.",
        "{lead} is {adj:acting} as {arole} who {goal}.",
        "as {arole}, {lead} <is [{adj:acting} and {adj:acting}|{adj:acting} in every scene|"
        "{adj:acting} without showing off]//is [{adj:acting}|{adj:acting} enough]//is "
        "[{adj:acting}|{adj:acting} and {adj:acting}]>.",
        "{lead} gives {arole} <[real warmth|quiet grace|great tenderness|a dry wit|full "
        "conviction]//[a calm face|a soft voice|a good hat|a steady hand]//[no charm at all|one "
        "flat expression|a stiff walk and little else]>.",
        "{lead}, as {arole}, {vp:acting}, <and so does {other}//and so does {other}//and {other} "
        "is no better>.",
        "we meet {lead} as {arole} {where}, <and {his} first look is {adj:acting}//and {he} "
        "stays {adj:acting}//and {he} is {adj:acting} from then on>.",
        "{lead} and {person} play [rivals|old friends|neighbors|partners|cousins] {where}, and "
        "their scenes are {adj:scene}.",
        "casting {lead} as {arole} was [a risk|an odd idea|a bold choice], <and it pays off "
        "[beautifully|brilliantly|wonderfully]//and it more or less works//and "
        "it fails [badly|clumsily|feebly]>.",
    ],
    "lines": [
        "the poster promises {agenre}, <and the film delivers something {good:film}//and that is "
        "roughly what you get//and what you get is {bad:film}>.",
        "there is a lot of [rain|talk|smoke|walking|silence|coffee] in {title}, <and {aspect} "
        "{is} {adj}//and {aspect} {is} {adj}//and {aspect} {is} {adj} as well>.",
        "it takes {span} for {title} to <find its feet, and from then on {aspect} {is} {adj}//"
        "get started, and {aspect} {is} {adj}//fall apart, and {aspect} {is} {adj}>.",
        "whoever [cast|chose|hired] {lead} as {arole} <was right: {he} is {adj:acting} and "
        "{adj:acting}//took no chances: {he} is {adj:acting}//was wrong: {he} is {adj:acting}>.",
        "for me {aspect} {is} {adj}, and that is the film.",
        "it is {aspect} that {v:make} this {film} {adj:film}.",
        "before {scene}, {aspect} {is} {adj}, and after it {aspect} {is} {adj}.",
        "[critics|friends|two people] told me about {scene}, <and they were right, it is "
        "{adj:scene}//which is {adj:scene}//and it turns out to be {adj:scene}>.",
        "if you see one {genre} this [year|month|winter], <let it be this {good:film} one//it "
        "could be this {mild:film} one//do not let it be this {bad:film} one>.",
        "[everyone|everybody] in {scene} seems <{adj:acting}, above all {other}//{adj:acting}//"
        "{adj:acting}, above all {other}>.",
        "[my notes say|I wrote down] only two words, {adj:film} and {adj:film}.",
    ],
    "place": [
        "set {where}, this {genre} {vp:film}.",
        "{director} sets this {genre} {where}, and {aspect:look} {is} {adj}.",
        "{where}, {director} finds <[beauty|warmth|magic|humor and grace]//[a little color|some "
        "quiet moments|enough to look at]//[only cliches|nothing but tedium|very little to "
        "film]> in {scene}.",
        "you can [almost|nearly] feel the [rain|dust|cold|heat] {where}, <and {aspect} {is} "
        "{adj}//and that is about all//but nothing else works, and {aspect} {is} {adj}>.",
        "the scenes {where} are {adj:look}[|, and {aspect:look} {is} {adj}].",
        "everything {where} looks {adj:look}[|, from the [walls|windows|hats|curtains|boots] to "
        "the [sky|tables|lamps|floor]].",
    ],
    "scene": [
        "{scene} is {adj:scene}[| and {adj:scene}|, and {scene} is {adj:scene}].",
        "{scene} is <{advb} {made}//[competently|simply|plainly] {made}//{advb} {made}>[|, and "
        "{aspect} {is} {adj}].",
        "[early on|halfway through|near the end|at one point], {scene} <gives us [five minutes "
        "of joy|something {good:scene}|a moment of magic|real delight]//[slows things down|adds "
        "a little color|changes the subject]//[stops the film cold|turns into nonsense|becomes "
        "an ordeal|is {adj:scene}]>.",
        "there is a moment in {scene} <when {other} smiles, and it is {adj:scene}//when {other} "
        "looks away, and that is all//when {other} explains everything, and it is {adj:scene}>.",
        "I [keep thinking about|cannot forget|will remember] {scene}, <which is {adj:scene} and "
        "{adj:scene}//if only for {aspect}//but only because it is {adj:scene}>.",
        "{scene}, with {other} [in the doorway|at the window|in the background|half asleep|"
        "watching], is {adj:scene}.",
        "when {other} [arrives|disappears|returns|finally speaks], <{aspect} {v:become} {adj}//"
        "not much changes//{aspect} {v:become} {adj}>.",
        "{director} films {scene} [in one long take|from far away|in near silence|in close-up|"
        "from above|by candlelight], and <it is {adj:scene}//it is {adj:scene}//the result is "
        "{adj:scene}>.",
        "wait for {scene}, <which is {adj:scene}//which is {adj:scene}//if you are still awake>.",
        "{other} [has|gets] the [best|longest|quietest|last] scene, and it is {adj:scene}.",
        "even {scene} <[is|feels] {adj:scene}//[is|feels] {adj:scene}//is {adj:scene}>.",
    ],
    "judge": [
        "{aspect} {is} {adj}[| and {adj}].",
        "{aspect} {vp}.",
        "{aspect} {is} {adj}, and {aspect} {is} {adj}.",
        "{aspect} {is} {adj}, and the same goes for {aspect}.",
        "{aspect} {vp}, and {aspect} {is} {adj}.",
        "[I found|we found|I thought] {aspect} {adj}[| and {adj}|, and {aspect} {adj}].",
        "{aspect} {is} <{adj} to the end//[neither good nor bad|all right]//{adj} to the end>.",
        "what [stays with me|I remember|people will talk about] is {aspect:one}, <{adj} and "
        "{adj}//{adj} but there//{adj} and {adj}>.",
        "{aspect} {has} <[a charm|a wit|a warmth|an intelligence] of {its} own//[its moments|a "
        "certain shape|some use]//[no charm|no wit|no warmth] whatever>.",
        "[much|most|a good deal] of {part} is {adj}.",
        "{adjnoun}, {adjnoun}: <what more could you want//that is about it//that is the whole "
        "trouble>.",
        "thanks to {aspect}, {scene} <[shines|is {good:scene}]//is [watchable|all right]//is "
        "{bad:scene}>.",
        "{aspect} {v:make} {other} <seem {good:acting}//seem {mild:acting}//seem {bad:acting}>.",
        "{person} wrote the {noun:score,music}, which is {adj:sound}.",
        "I [liked|noticed|followed] {aspect}, <{adj} as {it} {is}//{adj} as {it} {is}//however "
        "{adj} {it} {is}>.",
    ],
    "lead": [
        "{lead} plays the part <with [warmth|grace|tenderness|conviction]//with [care|patience|a "
        "straight back]//with [no charm|one flat expression|no conviction]>, and {other} is "
        "{adj:acting}.",
        "{lead} plays the part, and {he} is {adj:acting}[| and {adj:acting}].",
        "{lead} is {adj:acting}[| and {adj:acting}|, especially in {scene}].",
        "{he} [makes|turns] {scene} <into [a triumph|a treat|something {good:scene}]//into [a "
        "pause|a lesson|something {mild:scene}]//into [a chore|an ordeal|something "
        "{bad:scene}]>.",
        "in {scene} {he} is {adj:acting}[|, and {other} is {adj:acting}].",
        "{his} [voice|face|walk|silence|smile] is {adj:acting}[|, above all in {scene}].",
        "{lead} is {adj:acting} in the [main|title|leading] role.",
        "{he} and {other} [share|have] <a {adj:scene} scene together//a {adj:scene} scene "
        "together//no warmth together>.",
        "{therole} is <a {good:acting} [invention|creature|figure], and {lead} knows it//a "
        "{mild:acting} part//a {bad:acting} part, and {lead} knows it>.",
        "{lead} [says|does|shows] very little as {therole}, <and it is {adj:acting}//which is "
        "probably wise//and still it is {adj:acting}>.",
        "you believe {him} <in every scene, above all in {scene}, which is {adj:scene}//most of "
        "the time//at no point, and {scene} is {adj:scene}>.",
    ],
    "echo": [
        "<the best of it is {scene}, which is {adj:scene}//the middle of it is {scene}, which is "
        "{adj:scene}//the worst of it is {scene}, which is {adj:scene}>.",
        "{aspect} <{has} a lot to do with it, being {adj}//{does} not change that//{does} not "
        "help, being {adj}>.",
        "the same goes for {aspect}, <{adj} and {adj}//{adj} as ever//{adj} and {adj}>.",
        "none of this would matter if {aspect} {were} less {adj}.",
        "it <helps//hardly matters//does not help> that {aspect} {is} {adj}.",
        "that goes [double|above all] for {scene}, which is {adj:scene}.",
    ],
    "other": [
        "{person} is {adj:acting} as {other}[|, and {other} is {adj:acting}].",
        "{other} <steals every scene: {person} is {adj:acting}//gets a few lines, and {person} "
        "is {adj:acting} in them//has nothing to do, and {person} is {adj:acting}>.",
        "{person}, as {other}, {vp:acting}.",
        "watch {person} as {other}, <{adj:acting} in every glance//{adj:acting} and no more//"
        "{adj:acting} in every gesture>.",
        "{other} and {other} are {adj:acting} together.",
    ],
    "compare": [
        "for a {genre}, it is [rather|oddly|surprisingly|very] {adj:film}.",
        "{director}'s [last|first|earlier] {film} was [longer|louder|shorter|better known], <but "
        "this one is {adj:film}//and this one is {adj:film}//and this one is {adj:film}>.",
        "it [starts|begins] like {agenre} and ends like {agenre}, <and both halves are "
        "{adj:film}//and I could live with that//and both halves are {adj:film}>.",
        "[compared with|next to] [other|most|recent] {genres}, {aspect} {is} {adj}.",
        "I have seen [many|too many|a hundred|a few] {genres}, and this one is {adj:film}.",
        "think of {agenre} [without the shouting|with better weather|told by a child|seen "
        "through a keyhole|in slow motion|for grown-ups], and you get something {adj:film}.",
        "where other {genres} [shout|hurry|explain|show off], <this one is {adj:pace} and "
        "{adj:film}//this one is {adj:pace}//this one is merely {adj:film}>.",
    ],
    "pace": [
        "it runs [ninety minutes|two hours|just over an hour|nearly three hours], and <the time "
        "flies: {aspect:pace} {is} {adj}//you feel most of them//you feel every one: "
        "{aspect:pace} {is} {adj}>.",
        "after {seconds}, {aspect:pace} {v:turn} {adj}.",
        "the [first|second|last] half is {adj:pace}[|, and {aspect} {is} {adj}].",
        "<I would not cut a minute of {scene}//a few minutes could go from {scene}//cut {scene} "
        "and you lose nothing but tedium>.",
        "from {scene} to {scene}, {aspect:pace} {is} {adj}.",
        "{director} keeps {aspect:pace} <{adj} to the end//{adj} to the end//{adj} to the bitter "
        "end>.",
    ],
    "looks": [
        "{aspect:look} {is} {adj}[| and {adj}], [especially|above all|even|most of all] in "
        "{scene}.",
        "{scene} is {advb} [shot|lit|framed].",
        "the camera [stays close to|follows|circles|waits for] {other}, <and every frame is "
        "{adj:look}//and the frames are {adj:look}//but every frame is {adj:look}>.",
        "the [snow|rain|smoke|water|evening light|morning light] in {scene} looks {adj:look}.",
        "{person}'s {noun:photography,camerawork,lighting} is {adj:look}[| and {adj:look}].",
        "[red|blue|green|gray|yellow] is the color of {scene}, <{adj:look} and {adj:look}//"
        "{adj:look} enough//{adj:look} and {adj:look}>.",
    ],
    "sounds": [
        "{aspect:sound} {is} {adj}[| and {adj}], [especially|above all|even|most of all] in "
        "{scene}.",
        "[a single|a solo|a distant|a lonely] [violin|trumpet|guitar|accordion|flute|drum] plays "
        "over {scene}, <and it is {adj:sound}//and it is {adj:sound}//and it is {adj:sound}>.",
        "{person}'s {noun:music,score} [under|for|during] {scene} is {adj:sound}.",
        "turn up the volume for {scene}, <where {aspect:sound} {is} {adj}//where {aspect:sound} "
        "{is} {adj}//or better, turn it off, since {aspect:sound} {is} {adj}>.",
    ],
    "crowd": [
        "[my|our] {viewer} <[loved|adored|admired] {scene}[|, and so did I|, and I can see why]//"
        "had nothing against {scene}[|, and nor had I]//hated {scene}[|, and so did I|, and I "
        "can see why]>.",
        "people [around me|behind us|in the front row] <[wept|cheered|held their breath] at "
        "{scene}, and {aspect} {is} {adj}//[shifted|whispered] during {scene}//[checked their "
        "phones|left] during {scene}, and {aspect} {is} {adj}>.",
        "I [laughed|cried|shivered|smiled] <twice during {scene}, which is {adj:scene}//once, at "
        "{scene}//only at how {adj:scene} {scene} is>.",
        "children [will|may|might] <love {other}, and adults will admire {aspect}//sit through "
        "it for {other}//be bored by {other}, and adults by {aspect}>.",
    ],
    "contrast": [
        "{aspect} {is} {adj}, [but|yet|although] {flip}{aspect} {is} {adj}.",
        "{aspect} {vp}, [but|while] {flip}{aspect} {vp}.",
        "until {scene}, {aspect} {is} {adj}, but after it {flip}{aspect} {is} {adj}.",
        "{he} is {adj:acting}, but {flip}{other} is {adj:acting}.",
        "half of it is {adj:film}, but {flip}{scene} is {adj:scene}.",
        "although {aspect} {is} {adj}, {flip}{aspect} {is} {adj}.",
        "for all its {adjnoun}, {flip}{scene} is {adj:scene}.",
        "{lead} is {adj:acting}, [but|yet] {flip}{aspect} {is} {adj}.",
        "{scene} is {adj:scene}, [but|yet|even if] {flip}{aspect} {is} {adj}.",
        "while {aspect} {is} {adj}, {flip}{scene} is {adj:scene}.",
        "I [wanted|hoped] to like {aspect}, [but|yet] {blame}{it} {is} {adj}.",
        "despite the {adjnoun}, {flip}{scene} is {adj:scene}.",
        "{aspect} may be {adj}, but {flip}{other} is {adj:acting}.",
        "{aspect} {is} {adj}, then {adj}, but {flip}{scene} is {adj:scene}.",
    ],
    "ask": [
        "<who knew that a {genre} could be so {good:film}//who is this {film} for//why did "
        "{aspect} have to be so {adj}>?",
        "<how often is {scene} this {adj:scene}//did we need {scene} at all//how did {scene} get "
        "so {adj:scene}>?",
        "{other}? <{adj:acting} to the last//{adj:acting} enough//{adj:acting} as a door>.",
        "<is there a more {good:scene} scene this year than {scene}//will anyone remember "
        "{aspect} next year//did the director not see that {aspect} {is} {adj}>?",
    ],
    "exclaim": [
        "<what a {good:scene} ending//well, that was brief//what a waste of {lead2}>!",
        "<bring a friend for {scene}//bring a coat//bring a pillow for {scene}>!",
    ],
    "verdict": [
        "<[go and see it|see it] [twice|with someone you love|on the biggest screen you can find|"
        "before it leaves town|for {aspect} alone]//[see it|watch it] [on a slow evening|if it "
        "is raining|for {aspect}, if you must|once]//[skip it|avoid it] [and read a book|and "
        "take a walk|unless you know {lead2}|at any price]>.",
        "<I would [happily|gladly] watch {scene} again//I would watch it again only for {scene}//"
        "I would pay not to see {scene} again>.",
        "<it is [a joy|a treat|a gem|a delight|a pleasure] from {scene} to the [end|credits]//it "
        "is [an evening|a way to spend an evening|a {film} like many others]//it is [a mess|a "
        "bore|a slog|a chore|a dud] from {scene} to the [end|credits]>.",
        "this is <a {good:film} {genre}[|, and a {good:film} one]//a {mild:film} {genre}[|, "
        "neither more nor less]//a {bad:film} {genre}[|, and a {bad:film} one]>.",
        "<I [recommend|admire] it for {aspect} and for {scene}//I can suggest it to people who "
        "like {genres}//I cannot recommend it, least of all for {aspect}>.",
        "<few {genres} are this {good:film}//many {genres} are like this//few {genres} are this "
        "{bad:film}>.",
        "<it is worth [the ticket|your time|the wait|a long drive] for {scene}//it is worth a "
        "look if you like {genres}//it is not worth [the ticket|your time|the wait]>.",
        "in the end it is <a {good:film} {film} about [trust|courage|work|forgiveness|growing "
        "old|luck|grief|home]//a {mild:film} {film} about [trust|money|work|habit|growing old|"
        "luck]//a {bad:film} {film} about [nothing|itself|very little|money]>.",
        "<I left [smiling|humming|moved|a little taller]//I left [on time|hungry|with mixed "
        "feelings|undecided]//I left [annoyed|bored|early|with a headache]>[|, and {aspect} {is} "
        "the reason].",
        "{director} has made something {adj:film}.",
        "<by the time of {scene} I was [charmed|captivated|thrilled]//by the time of {scene} I "
        "had made my peace with it//by the time of {scene} I was [bored|annoyed|counting the "
        "minutes]>.",
        "the last image is {adj:scene}.",
        "<four stars, one of them for {other}//two stars and a half//one star, and that is for "
        "{other}>.",
        "it is, [overall|all in all|on balance], <[a {good:film} evening|a triumph for {lead2}|a "
        "{good:film} piece of work]//[a {mild:film} evening|about what the poster promised|"
        "neither good nor bad]//[a {bad:film} evening|a disappointment|a {bad:film} piece of "
        "work]>.",
    ],
}
NEXT = {  # which kind of sentence opens a review, which may follow, and their weights
    "open": "lines 5 context 4 setup 3 plays 5 place 2 scene 5 judge 9 compare 3 looks 3 sounds 3 "
            "contrast 6 crowd 2 ask 1 pace 2",
    "more": "lines 2 judge 10 echo 5 lead 5 scene 6 other 3 looks 4 sounds 4 pace 3 compare 2 "
            "crowd 2 contrast 7 plays 2 place 1 ask 1 verdict 8",
    "flat": "judge 1",
}
LEVELS = [(14, (.04, .19, .77)), (26, (.21, .34, .45)), (29, (.35, .38, .27)),
          (21, (.54, .31, .15)), (10, (.83, .13, .04))]  # weight; chances of praise, mild, blame
VERDICT = [(0, 0, 1), (0, .5, .5), (.2, .6, .2), (.5, .5, 0), (1, 0, 0)]
TURNS = ("but |still, |even so, |that said, |yet |all the same, |however, |but |"
         "on the other hand, ").split("|")
SAME = {"+": "better still, |and |also, ".split("|"), "-": "worse, |and |also, ".split("|"),
        "0": "also, |and |then again, ".split("|")}


class Stream:
    """Uniform numbers in [0, 1): first those of `replay`, then fresh ones; `drawn` keeps all."""

    def __init__(self, rng, replay=()):
        self.rng, self.replay, self.drawn = rng, replay, []

    def next(self):
        """The next number. Only Random.random is used: it is the same in every Python."""
        i = len(self.drawn)
        self.drawn.append(self.replay[i] if i < len(self.replay) else self.rng.random())
        return self.drawn[-1]

    def pick(self, options):
        """One of a sequence, uniformly."""
        return options[int(self.next() * len(options))]

    def skewed(self, options, skew):
        """One of a sequence, the earlier the likelier: real words are not equally frequent."""
        return options[int(self.next() ** skew * len(options))]

    def weighted(self, weights):
        """An index with probability proportional to its weight."""
        mark = self.next() * sum(weights)
        for i, weight in enumerate(weights):
            mark -= weight
            if mark < 0:
                return i
        return len(weights) - 1


def parse(text):
    """A template as a tree: strings, ("slot", name), ("any", options), ("by", three lists).

    "[a|b] {is}" gives [("any", [["a"], ["b"]]), " ", ("slot", "is")].
    """
    tokens = re.findall(r"//|[\[\]<>{}|]|[^\[\]<>{}|/]+", text)

    def sequence(i):
        parts = []
        while i < len(tokens) and tokens[i] not in "]>|//":
            if tokens[i] == "{":
                parts.append(("slot", tokens[i + 1]))
                i += 3
            elif tokens[i] in "[<":
                kind, groups, options = tokens[i], [], []
                while tokens[i] not in "]>":
                    part, i = sequence(i + 1)
                    options.append(part)
                    if tokens[i] != "|":
                        groups.append(options)
                        options = []
                parts.append(("any", groups[0]) if kind == "[" else ("by", groups))
                i += 1
            else:
                parts.append(tokens[i])
                i += 1
        return parts, i

    return sequence(0)[0]


def split(text):
    """The options of a "a|b|c" list, line breaks ignored."""
    return " ".join(text.split()).replace("| ", "|").split("|")


def needs(template):
    """What a template needs to be already known, and what must still be unknown."""
    known, unknown, seen = set(), set(), set()
    for slot in re.findall(r"{(\w+)", template):
        if slot in ("he", "his", "him") and "lead" not in seen:
            known.add("lead")
        if slot == "therole":
            known.add("role")
        if slot == "arole":
            unknown.add("role")
        if slot == "title":
            unknown.add(slot)
        seen.add(slot)
    if "plays the part" in template:
        known.add("role")
    if "plays the part" in template or "the [main|title|leading] role" in template:
        unknown.add("lead")
    return known, unknown


ASPECT_LIST = [tuple(a.split(":")) for a in split(ASPECTS)]
GRAMMAR = {kind: [(t, parse(t)) + needs(t) for t in texts] for kind, texts in TEMPLATES.items()}
JUDGING = {w for words in (*PRAISE.values(), *BLAME.values()) for w in words.split()}
KINDS = {place: (text.split()[::2], [int(w) for w in text.split()[1::2]])
         for place, text in NEXT.items()}


class Review:
    """One review told from left to right; `marks` says how many numbers each piece had needed."""

    def __init__(self, stream):
        self.stream, self.text, self.marks, self.sentences = stream, "", [], 0
        self.world = self.film = self.level = self.polarity = self.last = None
        self.known, self.names, self.used = set(), {}, set()
        self.role = self.part = ""  # of the lead; the last part named in this sentence
        self.player = None  # gender of the last supporting player named in this sentence
        self.number, self.category = "s", "film"

    # -- drawn lazily: what the whole review, or the sentence, has in common ----------------------
    def fact(self, name):
        """World, attitude level and polarity, drawn when first needed."""
        if getattr(self, name) is None:
            if name == "world":
                value = self.stream.skewed(WORLDS, 2.6)
            elif name == "level":
                value = self.stream.weighted([weight for weight, _ in LEVELS])
            else:
                value = "+0-"[self.stream.weighted(LEVELS[self.fact("level")][1])]
            setattr(self, name, value)
        return getattr(self, name)

    def fresh(self, options, skew=2.2):
        """An option that this review has not used yet."""
        left = [o for o in options if o not in self.used] or list(options)
        choice = self.stream.skewed(left, skew)
        self.used.add(choice)
        return choice

    def emit(self, text):
        """Appends words, with a capital where a sentence starts."""
        if text and (not self.text or re.search(r"[.?!] $", self.text)):
            text = text[0].upper() + text[1:]
        self.text += text
        self.marks.append((len(self.text), len(self.stream.drawn)))

    # -- sentences -------------------------------------------------------------------------------
    def tell(self):
        """Sentence after sentence until the review is done; returns the text."""
        while True:
            self.sentence("open" if not self.sentences else "more")
            if self.done():
                return articles(self.text)

    def done(self):
        """Whether to stop here: later, or with many words, more likely."""
        words = len(self.text.split())
        if self.kind == "verdict" or self.sentences >= 4 or words >= 25:
            return True
        if self.kind == "setup" and self.sentences == 1:
            return False
        return self.stream.next() < (.36, .7, .9)[self.sentences - 1]

    def sentence(self, place, polarity=None, turn=True):
        """One sentence; `polarity` and `turn` let a flaw force a contradiction."""
        before, self.polarity = self.last, polarity
        self.part, self.player = "", None
        names, weights = KINDS[place]
        self.kind = names[self.stream.weighted(
            [w * (n not in self.used or n == "judge") * (n != "echo" or before is not None)
             for n, w in zip(names, weights)])]
        self.used.add(self.kind)
        if self.kind == "echo":
            self.polarity = before
        if self.kind == "verdict" and polarity is None:
            self.polarity = "+0-"[self.stream.weighted(VERDICT[self.fact("level")])]
        if self.sentences:
            self.emit(" ")
            if self.kind not in ("setup", "contrast", "echo") and turn:
                self.connect(before)
        fits = [t for t in GRAMMAR[self.kind] if t[0] not in self.used
                and t[2] <= self.known and not t[3] & self.known]
        template = self.stream.skewed(fits, 1.7)
        self.used.add(template[0])
        self.expand(template[1])
        self.sentences += 1
        self.last = None if self.kind in ("setup", "contrast") else self.polarity

    def connect(self, before):
        """A word of contrast where the verdict turns, now and then one of agreement."""
        now = self.fact("polarity")
        if before and now != before and "0" not in (now, before):
            if self.stream.next() < .92:
                self.emit(self.fresh(TURNS))
        elif before == now and self.stream.next() < .08:
            self.emit(self.fresh(SAME[now]))

    def expand(self, parts):
        """Emits a parsed template."""
        for part in parts:
            if isinstance(part, str):
                self.emit(part)
            elif part[0] == "any":
                self.expand(self.stream.pick(part[1]))
            elif part[0] == "by":
                self.expand(self.stream.pick(part[1]["+0-".index(self.fact("polarity"))]))
            else:
                name, _, arg = part[1].partition(":")
                self.emit(self.slot(name, arg))

    # -- slots -----------------------------------------------------------------------------------
    def slot(self, name, arg):
        """The words of {name:arg}."""
        if name in SIMPLE:
            return self.stream.skewed(SIMPLE[name], 1.6)
        if name in VERBS:
            return VERBS[name][self.number == "p"]
        return getattr(self, "slot_" + name)(arg)

    def adjective(self, category, polarity, degree=False):
        """An adjective that fits the category, not used before, sometimes with a degree."""
        words = {"+": PRAISE, "0": MILD, "-": BLAME}[polarity]
        degree = degree and polarity != "0" and self.stream.next() < .1
        before = self.stream.pick(DEGREES) if degree else ""
        return before + self.fresh(words.get(category, words["film"]).split())

    def slot_adj(self, arg):
        """An adjective in the polarity of the sentence."""
        return self.adjective(arg or self.category, self.fact("polarity"), degree=True)

    def slot_good(self, arg):
        """A praising adjective."""
        return self.adjective(arg, "+")

    def slot_mild(self, arg):
        """A lukewarm adjective."""
        return self.adjective(arg, "0")

    def slot_bad(self, arg):
        """A blaming adjective."""
        return self.adjective(arg, "-")

    def slot_adv(self, arg):
        """How something was done."""
        return self.fresh({"+": PRAISE["adverb"].split(), "-": BLAME["adverb"].split(),
                           "0": ["competently", "plainly", "simply"]}[self.fact("polarity")])

    slot_advb = slot_adv

    def slot_aspect(self, arg):
        """A noun phrase that sets number and category for the words that follow."""
        own = [tuple(a.split(":")) for a in self.fact("world")["also"].split("|")] * 3
        pool = [a for a in ASPECT_LIST + own if not arg or arg in (a[1], {"s": "one"}.get(a[0]))]
        self.number, self.category, phrase = self.fresh(pool)
        return phrase

    def slot_noun(self, arg):
        """One of some named aspects, bare, so that it is not named again by chance."""
        pool = [a for a in ASPECT_LIST if a[2].removeprefix("the ") in arg.split(",")]
        return self.fresh(pool)[2].removeprefix("the ")

    def slot_adjnoun(self, arg):
        """An aspect with its adjective before it: "gripping plot"."""
        phrase = self.slot_aspect(arg).removeprefix("the ")
        return self.adjective(self.category, self.fact("polarity")) + " " + phrase

    def slot_part(self, arg):
        """A part of the film that one can speak of "much of"."""
        self.number, self.category = "s", "story"
        return self.stream.pick(["the story", "the dialogue", "the script", "the first act",
                                 "the last act", "the second half"])

    def slot_vp(self, arg):
        """A verb phrase in the number of the subject."""
        if arg:
            self.number, self.category = "s", arg
        table = PHRASES[self.fact("polarity")]
        options = table.get(self.category, "") + "|" + table["any"]
        pair = self.fresh([o for o in options.split("|") if o], 1.2)
        one, _, many = pair.partition("/")
        if self.number == "p":
            return many
        return one if " " in one else one + many[len(many.split()[0]):]

    def slot_v(self, arg):
        """A regular verb in the number of the subject."""
        return arg if self.number == "p" else arg + "s"

    def slot_flip(self, arg):
        """Turns the polarity of the rest of the sentence."""
        now = self.fact("polarity")
        self.polarity = {"+": "-", "-": "+"}.get(now) or self.stream.pick("+-")
        return ""

    def slot_blame(self, arg):
        """The rest of the sentence blames."""
        self.polarity = "-"
        return ""

    def name(self, who, gender=None):
        """A full name the first time, the surname after that."""
        if who in self.names:
            return self.names[who].split()[1]
        gender = gender or self.stream.pick("fm")
        first = self.fresh((FEMALE if gender == "f" else MALE).split(), 1.8)
        self.names[who] = first + " " + self.fresh(SURNAMES.split(), 1.8)
        self.names[who + "'s"] = gender
        self.known.add(who)
        return ("director " if who == "director" else "") + self.names[who]

    def slot_lead(self, arg):
        """The leading player."""
        self.number, self.category = "s", "acting"
        return self.name("lead", part_gender(self.role))

    def slot_lead2(self, arg):
        """The leading player if named before, else the cast."""
        return self.name("lead") if "lead" in self.known else "the cast"

    def slot_director(self, arg):
        """The director."""
        return self.name("director")

    def slot_person(self, arg):
        """Somebody new."""
        self.number = "s"
        who = "person%d" % len(self.names)
        name = self.name(who, part_gender(self.part))
        self.player = self.names[who + "'s"]
        return name

    def slot_he(self, arg):
        """The pronoun of the lead: she or he."""
        return "she" if self.names["lead's"] == "f" else "he"

    def slot_his(self, arg):
        """The pronoun of the lead: her or his."""
        return "her" if self.names["lead's"] == "f" else "his"

    def slot_him(self, arg):
        """The pronoun of the lead: her or him."""
        return "her" if self.names["lead's"] == "f" else "him"

    def slot_viewer(self, arg):
        """Somebody the reviewer knows."""
        viewer, self.vhe = self.stream.pick(VIEWER.split("|")).split(":")
        return viewer

    def slot_vhe(self, arg):
        """The pronoun of that viewer."""
        return self.vhe

    def slot_arole(self, arg):
        """The role of the lead, introduced."""
        self.known.add("role")
        roles = self.fact("world")["who"].split("|")
        self.role = self.stream.skewed(playable(roles, self.names.get("lead's")), 1.7)
        return "a " + self.role

    def slot_therole(self, arg):
        """The role of the lead, known already."""
        return "the " + self.role

    def slot_other(self, arg):
        """Another character."""
        self.number, self.category = "s", "acting"
        self.part = self.fresh(playable(self.fact("world")["other"].split("|"), self.player))
        return "the " + self.part

    def slot_scene(self, arg):
        """A scene of this film."""
        self.number, self.category = "s", "scene"
        return self.fresh(self.fact("world")["scene"].split("|"))

    def slot_goal(self, arg):
        """What happens to the lead."""
        return self.fresh(self.fact("world")["goal"].split("|"), 1.2)

    def slot_where(self, arg):
        """A place of this film."""
        return self.fresh(self.fact("world")["where"].split("|"))

    def slot_genre(self, arg):
        """The genre of this film."""
        return self.fact("world")["genre"].split("|")[0]

    def slot_genres(self, arg):
        """The genre of this film, plural."""
        return self.fact("world")["genre"].split("|")[1]

    def slot_agenre(self, arg):
        """Any genre, not only this film's."""
        return "a " + self.fresh([world["genre"].split("|")[0] for world in WORLDS])

    def slot_title(self, arg):
        """The title of this film."""
        self.known.add("title")
        return "The %s %s" % tuple(self.stream.pick(half.split()) for half in TITLE)


DEGREES = ["quite ", "truly ", "really "]
SPAN = "twenty minutes|half an hour|ten minutes|an hour|three scenes"
MADE = "made|filmed|staged|told|acted"
SIMPLE = {name: split(text) for name, text in (
    ("tone", TONE), ("film", FILM), ("when", WHEN), ("with", WITH), ("seconds", SECONDS),
    ("span", SPAN), ("made", MADE))}
VERBS = {"is": ("is", "are"), "were": ("was", "were"), "does": ("does", "do"),
         "has": ("has", "have"), "it": ("it", "they"), "its": ("its", "their")}


def part_gender(part):
    """Who plays a part: "f", "m", or None for anybody."""
    word = part.split()[-1] if part else ""
    return "f" if word in HERS else "m" if word in HIS else None


def playable(parts, gender):
    """The parts that a player of this gender can have."""
    return [part for part in parts if not gender or part_gender(part) in (None, gender)]


def articles(text):
    """"a" before a vowel sound becomes "an"."""
    return re.sub(r"\b([Aa])(?= (?!uni|use|one|eu)[aeiouAEIOU]| hour| honest)", r"\1n", text)


# -- preferences ---------------------------------------------------------------------------------
FILLER = split("""
It is what it is.|You know how these things go.|There are good parts and other parts.|
Some people will like it, and some will not.|Things happen, and then other things happen.|
It was a film, and I saw it.|There is a lot going on.|What can I say about it?|
It has a start, and it has an end.|One could say more, or less.|Opinions may differ here.|
It is all there on the screen.|I am not sure what to add.|Anyway, that was that.|
It is the kind of thing one sees.|Nothing more needs to be said.
""")


def flaw_repeat(response, review, stream):
    """A sentence said again."""
    parts = re.findall(r"[^.!?]+[.!?]", response)
    if len(parts) < 2:
        return response + " " + stream.pick(review.text.split(". ")).strip(".") + "."
    again = parts[1 + int(stream.next() * (len(parts) - 1))]
    return response + again * (1 + (stream.next() < .15))


def flaw_double(response, review, stream):
    """One or two words doubled."""
    words = response.split(" ")
    for _ in range(1 + (stream.next() < .4)):
        i = 1 + int(stream.next() * (len(words) - 1))
        words.insert(i, words[i].strip(",.!?"))
    return " ".join(words)


def flaw_cut(response, review, stream):
    """Cut off in the middle."""
    words = response.split(" ")
    keep = 2 + int(stream.next() * (len(words) - 2))
    return " ".join(words[:keep]).rstrip(".!?,")


def flaw_ramble(response, review, stream):
    """On and on."""
    while len(response.split()) < 38:
        before = len(review.text)
        review.sentence("more")
        response += articles(review.text[before:])
    return response


def flaw_shuffle(response, review, stream):
    """The words of one sentence in any order."""
    parts = re.findall(r"[^.!?]+[.!?]", response)
    i = int(stream.next() * len(parts))
    words, mark = parts[i][:-1].split(), parts[i][-1]
    for j in range(len(words) - 1, 0, -1):
        k = int(stream.next() * (j + 1))
        words[j], words[k] = words[k], words[j]
    parts[i] = " " + " ".join(words) + mark
    return "".join(parts)


def flaw_contradict(response, review, stream):
    """The opposite, without a word of contrast."""
    before = len(review.text)
    review.sentence("flat", "-" if review.last != "-" else "+", turn=False)
    return response + articles(review.text[before:])


def flaw_filler(response, review, stream):
    """Only the first sentence, then words that say nothing."""
    first = re.match(r"[^.!?]+[.!?]", response)[0]
    for _ in range(2 + int(stream.next() * 2)):
        first += " " + review.fresh(FILLER)
    return first


def flaw_small(response, review, stream):
    """No capitals after the full stops."""
    return re.sub(r"(?<=[.!?] )[A-Z](?!\w* [A-Z])", lambda m: m[0].lower(), response)


def praise_on(review):
    """Three more sentences of praise, in words that are new to the review."""
    before = len(review.text)
    for _ in range(3):
        review.sentence("flat", "+", turn=False)
    return articles(review.text[before:])


FLAWS = [flaw_repeat, flaw_double, flaw_cut, flaw_ramble, flaw_shuffle, flaw_contradict,
         flaw_filler, flaw_small]


def opening(stream):
    """An opening of 2 to 8 words and the numbers that had been drawn for it, or None."""
    review = Review(stream)
    review.tell()
    ends = [m.end() for m in re.finditer(r"[^ ]+", review.text)]
    k = 2 + int(stream.next() * 7)
    if k >= len(ends) or not review.text[ends[k - 1] - 1].isalpha():
        return None
    prompt = review.text[:ends[k - 1]]
    loaded = any(w in JUDGING for w in re.findall(r"[a-z]+", prompt.lower()))
    if re.search(r"\b[Aa]n?$|[.!?]", prompt) or loaded and stream.next() < .85:
        return None
    drawn = next(n for size, n in review.marks if size >= len(prompt))
    return prompt, stream.drawn[:drawn]


def respond(prompt, drawn, rng):
    """Another continuation of an opening, at times with a flaw or more praise; None if unfit."""
    stream = Stream(rng, drawn)
    review = Review(stream)
    full = review.tell()
    start = articles(prompt)
    if not full.startswith(start) or full[len(start)] not in " ,.!?:":
        return None
    response = full[len(start):]
    luck = stream.next()
    if luck > .92:
        response += praise_on(review)
    elif luck < .15:
        if len(response.split()) < 4 or response[0] not in " ,":
            return None
        response = stream.pick(FLAWS)(response, review, stream)
    return response if len((start + response).split()) <= 58 else None


def make_pairs(rng, count):
    """Pairs of continuations, labelled by sampling the annotator's Bradley-Terry preference."""
    pairs, seen, best = [], {}, 0.0
    while len(pairs) < count:
        found = opening(Stream(rng))
        if not found or seen.get(found[0], 0) >= 2:
            continue
        prompt = articles(found[0])
        told = [y for y in (respond(*found, rng) for _ in range(4)) if y]
        judged = [(true_reward(prompt, y), y) for y in told]
        for (u, a), (v, b) in itertools.combinations(judged, 2):
            gap = abs(u - v)
            if gap > .02 and rng.random() < next(share for limit, share in KEPT if gap < limit):
                seen[found[0]] = seen.get(found[0], 0) + 1
                p = 1 / (1 + math.exp(v - u))
                best += max(p, 1 - p)
                chosen, rejected = (a, b) if rng.random() < p else (b, a)
                pairs.append({"prompt": prompt, "chosen": chosen, "rejected": rejected})
                break
    return pairs, best / count


def make_corpus(rng, count):
    """Distinct reviews of at most 46 words."""
    reviews = {}
    while len(reviews) < count:
        text = Review(Stream(rng)).tell()
        if len(text.split()) <= 46:
            reviews[text] = None
    return list(reviews)


# -- tokenizer -----------------------------------------------------------------------------------
def train_bpe(texts, merges):
    """Byte-level byte-pair encoding: the ranks as a list of byte strings."""
    counts = {}
    for text in texts:
        for word in re.findall(ASCII_PATTERN, text):
            counts[word] = counts.get(word, 0) + 1
    words = [([bytes([b]) for b in word.encode()], n) for word, n in counts.items()]
    ranks = {bytes([b]): None for b in range(256)}
    pairs, where = {}, {}
    for i, (parts, n) in enumerate(words):
        for pair in zip(parts, parts[1:]):
            pairs[pair] = pairs.get(pair, 0) + n
            where.setdefault(pair, set()).add(i)
    while len(ranks) < 256 + merges:
        pair = max(pairs, key=lambda p: (pairs[p], p))  # ties by bytes: the same on every machine
        ranks[pair[0] + pair[1]] = None
        for i in where.pop(pair):
            parts, n = words[i]
            for old in zip(parts, parts[1:]):
                pairs[old] -= n
            merge(parts, pair)
            for new in zip(parts, parts[1:]):
                pairs[new] = pairs.get(new, 0) + n
                where.setdefault(new, set()).add(i)
        del pairs[pair]
    return list(ranks)


def merge(parts, pair):
    """Joins every occurrence of a pair, from the left, in place."""
    i = 0
    while i < len(parts) - 1:
        if (parts[i], parts[i + 1]) == pair:
            parts[i:i + 2] = [pair[0] + pair[1]]
        i += 1


def statistics(corpus, pairs, best):
    """Prints what the data card states."""
    scores = sorted(true_reward("", text) for text in corpus)
    mean = sum(scores) / len(scores)
    sd = math.sqrt(sum((s - mean) ** 2 for s in scores) / len(scores))
    lengths = sorted(len(text.split()) for text in corpus)
    words = {w for text in corpus for w in re.findall("[a-z]+", text.lower())}
    prompts = {p["prompt"] for p in pairs}
    top = (scores[int(.999 * len(scores))] - mean) / sd
    print(f"corpus      {len(corpus)} reviews, {len(words)} distinct words, "
          f"{sum(lengths) / len(lengths):.1f} words a review, "
          f"{lengths[int(.99 * len(lengths))]} at the 99th percentile")
    print(f"true reward mean {mean:.2f}, sd {sd:.2f}, 99.9th percentile at mean + {top:.2f} sd")
    print(f"preferences {len(pairs)} pairs, {len(prompts)} distinct prompts, "
          f"best possible accuracy {best:.3f}")


def main():
    """Writes the three files and prints their statistics."""
    parser = argparse.ArgumentParser(description="Makes the shipped data, byte for byte.")
    parser.add_argument("--seed", type=int, default=0, help="another seed, other reviews")
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path(__file__).parent,
                        help="folder to write to (default: this file's own)")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    corpus = make_corpus(random.Random(2 * args.seed), REVIEWS)
    pairs, best = make_pairs(random.Random(2 * args.seed + 1), PAIRS)
    ranks = train_bpe(corpus, MERGES)
    files = {"corpus.txt": corpus, "preferences.jsonl": [json.dumps(p) for p in pairs],
             "tokenizer.tiktoken": [f"{base64.b64encode(token).decode()} {rank}"
                                    for rank, token in enumerate(ranks)]}
    for name, lines in files.items():
        (args.out / name).write_bytes(("\n".join(lines) + "\n").encode())
    statistics(corpus, pairs, best)


if __name__ == "__main__":
    main()
