"""Captions to words as in the COCO caption evaluation (notebooks 01 and 09).

The evaluation runs Stanford's PTBTokenizer (3.4.1, ``-lowerCase``) and drops a list of punctuation
marks from its output. The rules are those of a lexer: at each position every rule is tried, the
longest match wins, and among equals the first rule. Lookahead, such as the ``'s`` after a noun,
counts towards the length and is then read again.

Differences, which do not affect English captions: an ideograph or kana is a word of its own, a
combining mark belongs to its letter in every script, punctuation beyond Latin-1 and all quotation
marks are dropped, a curly apostrophe becomes a straight one, and numbers that the lexer would join
across a space (1 1/2, a telephone number) stay apart.
"""

import functools
import unicodedata
from collections.abc import Sequence

import regex

_LETTER = r"[\p{L}\p{M}\xad]"  # the soft hyphen is taken out of the finished word
_SIGN = r"[\p{L}\p{M}\p{Nd}\xad]"
_WORD = rf"{_LETTER}{_SIGN}*(?:[.!?]{_LETTER}{_SIGN}*)*"
_AUXILIARY = r"'(?:[msd]|re|ve|ll)"
_INITIALS = r"[a-z](?:\.[a-z])+"  # u.s, d.c
_PREFIX = rf"(?:[dol]['`]{_SIGN})?"  # d'artagnan, o'clock
_HYPHENATED = rf"{_PREFIX}{_SIGN}+(?:[-_\u058a\u2010\u2011]{_PREFIX}{_SIGN}+)*"
_COMPOUND = rf"[a-z0-9][a-z0-9.,\xad]*(?:-(?:[a-z0-9\xad]+|{_INITIALS}\.))+"  # 5.5-inch
_JOINED = r"(?-i:[A-Z]+(?:(?:[+&]|&amp;)[A-Z]+)+)"  # AT&T
_SIDE = r"[a-z0-9]+(?:-[a-z]+){0,2}"  # of a slash
_NAME = r"[a-z][a-z0-9_:.-]*"  # of a tag or its attribute
_ATTRIBUTE = rf" +{_NAME}(?: *= *(?:'[^']*'|\"[^\"]*\"|{_NAME}))?"
_TAG = rf"<(?=[^<>]{{1,200}}>)(?:[!?][a-z-][^>]*|{_NAME}(?:{_ATTRIBUTE})* */?|/{_NAME}) *>"
_PAGE = r"(?:/[^\s\"<>|()]+[^\s\"<>|.!?(){},-])?"  # after an address

# Words that keep their period: abbreviations in any case, abbreviations in this case only, titles,
# and a few before numbers.
_ABBREVIATIONS = (
    r"al|ala|apr|ariz|assn|aug|bancorp|bhd|bldg|bros|calif|colo|conn|corp|cos?|ct|dak|dec|ed\.d|"
    r"esq|est|etc|ext|feb|"
    r"fla|fri|ga|inc|ind|intl|jan|jr|jul|jun|kans?|ky|ltd|mar|md|mich|minn|mo|mon|mont|neb|nev|"
    r"nov|oct|okla|penn|"
    r"ph\.d|plc|rt|sept?|seq|sq|sr|sys|tel|tenn|thu|thurs|tues?|univ|va|vt|wed|wisc?|wyo"
)

_AS_WRITTEN = "Ark|Az|Del|Ill|La|Mass|Miss|Ore|Pa|Tex|Wash|[Pp]p?t[ey]s?"

_TITLES = (
    "[a-z]|adj|ad[mv]|alex|assoc|asst|attys?|ave|blvd|brig|capt|cf|cie|cmdr|col|comdr|cpl|dept|"
    "det|drs?|elec|ens|ft|"
    "gen|govs?|hon|insp|invt|jos|lieut|lt|maj|messrs|m(?-i:[ft])g|mlle|mme|mrs?|ms|msgr|mt|natl|"
    "pfc|ph|pres|profs?|"
    "pvt|rd|reps?|rev|sens?|sfc|sgt|spc|ste?|supts?|treas|vs|wm"
)

_BEFORE_NUMBERS = "art|ca|figs?|nos?|op|pp|prop"

_SENTENCE_STARTS = (
    r"A(?:bout|ccording|dditionally|fter|n|s|t)?|But|D(?:id|uring)|Earlier|H(?:er?|ere|ow|owever)|"
    r"I[fnt]|Last|"
    r"M(?:any|ore|r\.|s\.)|Now|O(?:nce|ne|ther|ur)|S(?:he|ince|o|ome|uch)|The(?:ir|n|re|se|y)?|"
    r"Th(?:at|is)|We|"
    r"Wh(?:at|en|ile|o|y)|Yet|You"
)

_ONE_WORD = (  # with apostrophes that split nothing
    r"'n'?|[ldj]'|dunkin'|somethin'|ol'|'em|'[2-9]0s|'till?|'cause|cont'd\.?|nor'easter|c'mon|"
    r"e'er|s'mores|ev'ry|li'l|"
    r"nat'l|o['`]o|cap'n|c'est|(?-i:[A-HJ-XZn])['`]\p{L}{2,}|"
    r"\p{L}+[aeiouy]['`](?-i:[aeiouA-Z])\p{L}*"
)

_EXTENSIONS = (
    "bat|bmp|c|class|cgi|cpp|dll|docx?|exe|gif|gz|h|html?|jar|java|jpe?g|mov|mp3|pdf|php|pl|png|"
    "ppt|ps|py|sql|tar|txt|"
    "wav|x|xml"
)

# Group 1 of a rule becomes the token; the rest is lookahead. Letters match in both cases.
_RULES = (
    r""
    r"(can(?=not)|(?:gon|wan)(?=na)|got(?=ta)|(?:lem|gim)(?=me)|'t(?=is|was))"
    r"(?:not|[nt]a|me|is|was)",
    rf"({_TAG})",
    rf"({_WORD}){_AUXILIARY}",
    r"([a-z\xad]*[a-mo-z]\xad*)n['`]t",
    rf"({_WORD})",
    rf"({_ONE_WORD})",
    r"(y')\p{L}",
    r"((?:ftp|https?)://[^\s\"<>|()]+[^\s\"<>|.!?(){},-])",
    rf"(www\.(?:[^\s\"<>|.!?(){{}},]+\.)+[a-z]{{2,4}}{_PAGE})",
    rf"((?:(?-i:[^\s\"`'<>|.!?(){{}}$,-_])+\.)+(?:com|net|org|edu){_PAGE})",
    r"((?:<|&lt;)?[a-z0-9][^\s\"<>|(){}]*@(?:[^\s\"<>|(){}.]+\.)*[^\s\"<>|(){}.]+(?:>|&gt;)?)",
    rf"(@[a-z_][a-z_0-9]*|\#{_LETTER}+)",
    rf"({_AUXILIARY}|n['`]t)[^a-z]",
    r"(\d{1,2}[-/]\d{1,2}[-/]\d{2,4}|(?:\d{1,4}-)?\d{1,4}[/\u2044]\d{1,4})",
    r"([-+]?(?:\d*(?:[.:,\xad]\d+)+|\d+))",
    r"(-[lr][rcs]b-|pro-|anti-|s(?:&|&amp;)p-500|s(?:&|&amp;)ls)",
    rf"({_SIDE}(?:\\?/{_SIDE}){{1,2}})",
    r"((?-i:[A-Z]*)\$)",
    rf"([a-z])\. (?:{_TAG}|(?-i:(?=[A-Z]))(?:{_SENTENCE_STARTS}))\s",
    rf"((?:{_BEFORE_NUMBERS})\.) ?\d",
    rf"((?:{_ABBREVIATIONS}|(?-i:{_AS_WRITTEN}))\.)(?:..)?",
    rf"((?:{_TITLES}|{_INITIALS})\.)",
    rf"((?:{_WORD}|{_HYPHENATED}|{_COMPOUND}|{_JOINED})\.)[,;:]",
    r"('\d\d)\s",
    rf"([a-z0-9]+(?:\.[a-z0-9]+)*\.(?:{_EXTENSIONS}))[\s.?!,]",
    r"((?-i:[<>]?[:;=][-o*']?[()DPdpO\\{@|\[\]]))[^a-z0-9]",
    r"((?-i:[-^x=~<>']_[-^x=~<>']|\([-^x=~<>'][_.]?[-^x=~<>']\)|\([\^x=~<>']-[\^x=~<>'`]\)))",
    rf"({_COMPOUND})",
    rf"({_HYPHENATED})",
    rf"({_JOINED})",
    r"(')[a-z]\S",
    r"([cf]\#|c\+\+|-+|<<|>>|\\\*|\.{3,5}|[?!]+|@+|\#+|_+|\*+|''|``|&amp;|&[lg]t;)",
    r"(.)",
)

_COMPILED = [regex.compile(rule, regex.IGNORECASE | regex.POSIX | regex.DOTALL) for rule in _RULES]
_SPACED = regex.compile(rf"(?:{_TAG}|\S)+", regex.IGNORECASE)
_CJK = regex.compile(r"[\p{Han}\p{Hiragana}\p{Katakana}]")
_CJK_GAP = regex.compile(rf"(?<={_CJK.pattern}) (?={_CJK.pattern})")

_SAME_MARKS = str.maketrans(
    {"\u2019": "'", "\u0092": "'", "\u2018": "`", "\u0091": "`"}
    | dict.fromkeys("\u201c\u201d\u201e\xab\xbb", '"')
)

_DROPPED = {"'", '"', "''", "``", "`", ".", "?", "!", ",", ":", ";", "-", "--", "---", "----"}

_NORMAL = {
    "[": "-lsb-",
    "]": "-rsb-",
    "{": "-lcb-",
    "}": "-rcb-",
    "&amp;": "&",
    "&lt;": "<",
    "&gt;": ">",
    "\xbc": "1/4",
    "\xbd": "1/2",
    "\xbe": "3/4",
    "\xa2": "cents",
    "\xa3": "#",
    "\xa4": "$",
    "\u20ac": "$",
}

_CACHED_LENGTH = 40  # characters of a chunk whose words are cached
_CHUNK_LENGTH = 500  # characters; the time for a chunk grows with the square of its length
_NEVER_SPACED = ("'s", "'m", "'d", "'re", "'ve", "'ll", "n't")
_WRITTEN = {"-lrb-": "(", "-rrb-": ")", "-lsb-": "[", "-rsb-": "]", "-lcb-": "{", "-rcb-": "}"}


def tokenise(caption: str) -> list[str]:
    """Split a caption into lower-case words: "It's raining." -> "it", "'s", "raining".

    Punctuation is dropped, as in the COCO caption evaluation (see the module's text for the
    differences). Training captions, hypotheses and references are all split by this function, so
    no score depends on punctuation.
    """
    text = caption.translate(_SAME_MARKS)
    if not text.isascii():
        text = _CJK.sub(r" \g<0> ", text)
    chunks = _SPACED.findall(text) if "<" in text else text.split()
    words: list[str] = []
    for i, chunk in enumerate(chunks):
        # Only after a period the next chunk matters: "Sit with I. The dog" ends a sentence, "No. 5"
        # does not.
        following = chunks[i + 1] if chunk[-1] == "." and i + 1 < len(chunks) else ""
        if len(chunk) + len(following) <= _CACHED_LENGTH:
            words += _cached_words(chunk, following)
        else:
            for start in range(0, len(chunk), _CHUNK_LENGTH):
                words += _words(chunk[start : start + _CHUNK_LENGTH], following[:_CHUNK_LENGTH])
    return words


def _words(chunk: str, following: str) -> tuple[str, ...]:
    """Return the words of ``chunk``, which has no spaces around it."""
    text, position, words = f"{chunk} {following} ", 0, []
    while position < len(chunk):
        matches = [match for rule in _COMPILED if (match := rule.match(text, position))]
        longest = max(matches, key=lambda match: match.end())
        token = _normalise(longest[1])
        if token not in _DROPPED:
            words += token.split()
        position = longest.end(1)
    return tuple(words)


_cached_words = functools.lru_cache(maxsize=1 << 16)(_words)


def forget_words() -> None:
    """Empty the cache of words, so that each run of a benchmark costs the same."""
    _cached_words.cache_clear()


def _normalise(token: str) -> str:
    """Write a token as the Treebank does; symbols without meaning in a caption become empty."""
    token = _NORMAL.get(token, token)
    if token.startswith("...") or not token.strip("\xad\ufe0e\ufe0f"):
        return ""
    if len(token) == 1 and not token.isalnum() and not "!" <= token <= "~":
        symbol = unicodedata.category(token)[0] == "S" and token < "\u2c00"
        return token if symbol or "\xa0" < token < "\u0100" else ""
    return token.lower().replace("\xad", "").replace("(", "-lrb-").replace(")", "-rrb-")


def join_words(words: Sequence[str]) -> str:
    """Join words to a caption, contractions without a space: "it", "'s" -> "it's"."""
    text = ""
    for word in words:
        text += word if not text or word in _NEVER_SPACED else f" {_WRITTEN.get(word, word)}"
    return _CJK_GAP.sub("", text)
