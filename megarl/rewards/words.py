"""English words that tell whether a short review is pleased; a toy for examples and tests, not a language resource."""

from __future__ import annotations


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


POSITIVE = _words(
    """
    admirable adore adored amazing amusing astonishing beautiful beautifully best better bold brave bright
    brilliant captivating charming cheerful clever comfortable compelling convincing cute dazzling delight
    delighted delightful elegant emotional enchanting engaging enjoy enjoyable enjoyed entertaining
    enthralling epic excellent exceptional excited exciting exquisite extraordinary fabulous fantastic
    fascinating favorite favourite fine finest flawless fresh friendly fun funny generous genius gentle glad
    glorious good gorgeous graceful grand great greatest gripping happy heartfelt heartwarming hilarious
    honest hopeful impressive incredible ingenious inspired inspiring intelligent interesting joy joyful
    likable liked love loved lovely loving magical magnificent marvelous masterful masterpiece memorable
    moving nice original outstanding perfect perfectly playful pleasant pleased pleasing pleasure poignant
    polished powerful praise recommend recommended refreshing remarkable rewarding rich satisfied satisfying
    sensational sincere smart smooth solid sparkling spectacular splendid stellar strong stunning sublime
    succeed success successful superb superior surprising sweet talented tender terrific thoughtful thrilling
    touching treasure triumph unforgettable uplifting vibrant vivid warm win wise witty wonderful worthwhile
    worthy
    """
)
NEGATIVE = _words(
    """
    absurd abysmal amateurish angry annoyed annoying appalling atrocious average awful awkward bad badly banal
    bland boring bored broken careless cheap cheesy chore clumsy confused confusing contrived crude cruel
    dated depressing derivative dire dirty disappoint disappointed disappointing disappointment disaster
    disgusting dismal distasteful dreadful dreary dull dumb embarrassing empty endless excruciating fail
    failed fails failure fake flat flawed flop forced foolish forgettable frustrating garbage generic ghastly
    gloomy grating gross hate hated hideous hollow hopeless horrible horrid horrific inane incoherent inept
    inferior insipid insulting irritating joke lacking lackluster lame lazy lifeless limp loathe lousy
    ludicrous mediocre mess messy mindless miserable mistake mundane nasty nauseating nonsense obnoxious
    offensive ordinary overlong overrated painful pathetic plodding pointless poor poorly predictable
    preposterous pretentious regret repetitive ridiculous rubbish ruined sad senseless shallow shameful sloppy
    slow stale stupid tasteless tedious terrible tiresome trash trite ugly unbearable unbelievable
    unconvincing unfunny uninspired unpleasant unwatchable useless vile violent waste wasted weak weird worse
    worst worthless wooden wrong
    """
)
NEGATIONS = _words(
    """
    not no never neither nor without hardly barely scarcely cannot cant dont doesnt didnt isnt wasnt arent
    werent wont wouldnt couldnt shouldnt hasnt havent hadnt aint nothing
    """
)
