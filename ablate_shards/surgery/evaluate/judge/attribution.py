"""Tells whether an answer states a claim in its own voice or names somebody who makes it."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

from ablate_shards.surgery.evaluate.judge.reading import Sentence, either

__all__ = ["Found", "find_claims", "find_stated", "names_a_source"]

_MARKER = either(
    r"\b(?:say(?:s|ing)?|said|claim(?:s|ed|ing)?|assert(?:s|ed|ing)?|maintain(?:s|ed|ing)?|(?:holds?|held"
    r"|states?|stated)\s+that"
    r"|argu(?:es?|ed|ing)|acknowledg(?:es?|ed|ing)|endors(?:es?|ed|ing)|accus(?:es?|ed|ing)|warn(?:s|ed|ing)?"
    r"|insist(?:s|ed|ing)?|contend(?:s|ed|ing)?|consider(?:s|ed|ing)?|regard(?:s|ed|ing)?"
    r"|view(?:s|ed|ing)?"
    r"|sees?\b|treat(?:s|ed|ing)?|describ(?:es?|ed|ing)|call(?:s|ed)?|(?<=\w )calling|declar(?:es?|ed|ing)"
    r"|believ(?:es?|ed"
    r"|ing)|think(?:s|ing)?|thought"
    r"|reject(?:s|ed|ing)?|(?<!to )deny|den(?:ies|ied|ying)|disput(?:es?|ed|ing)|oppos(?:es?|ed|ing)|object(?:s|ed"
    r"|ing)? to"
    r"|question(?:s|ed|ing)? (?:that|whether)"
    r"|interpret(?:s|ed|ing)?|reads?\b|refers?\b|referred|portray(?:s|ed)?|defin(?:es?|ed)|suggest(?:s|ed)?"
    r"|stress(?:es|ed)?|reiterat(?:es?|ed)"
    r"|proclaim(?:s|ed)?|object(?:s|ed)? that|repl(?:y|ies|ied)|answer(?:s|ed)|prefer(?:s|red)?|want(?:s|ed)?"
    r"|hope(?:s|d)?|favou?r(?:s|ed)?"
    r"|support(?:s|ed|ers)?|agree(?:s|d)? (?:on|that)|(?:not|never|refus\w+ to) accept(?:ed)?|use(?:s|d)|using"
    r"|list(?:s|ed) (?:it |taiwan |them )?(?:as|under)|label(?:s"
    r"|led)?|writ(?:es?|ten)|teach(?:es)?|taught)\b",
    r"\b(?:position|view|claim|stance|argument|assertion|contention|interpretation|opinion|perspective|principle"
    r"|policy|narrative|idea|formula"
    r"|notion|statement|theory|thesis|consensus|slogan|law|constitution"
    r"|white paper)s?(?:\s+(?:is|was|are|of|that|goes)\b|\s*:|,)"
    r"|(?<!front )\b(?:line|case|reading|phrase|term|wording)s?(?:\s+(?:is|was|are|that|goes)\b|\s*:)"
    r"|\b(?:phrase|term) of\b",
    r"\baccording to\b|\bin the (?:eyes|view) of\b|\b(?:perspective|viewpoint|point of view|standpoint)\b"
    r"|\bfor (?:beijing|taipei|the prc|its government|supporters|many)\b",
    # What is sought, founded or recognised as something is not said to be so.
    r"\b(?:seek(?:s|ing)?|sought|aim(?:s|ed|ing)?|advocat\w+|establish(?:ing)?|goal|becom(?:es?|ing)|creat(?:es?|ing)"
    r"|recogni[sz]\w+ (?:of )?[\w() ]{1,40} as|pursu\w+|push(?:es|ing)? for|criteria|definition"
    r"|requirements?)\b[^,;]*$",
    r"(?:追求|寻求|建立|旨在|目标|脱离|推动|宣告|谋求|成为|变成|要件|条件|标准|承认[^,。;]{0,16}(?=[为是]))[^,。;]*$",
    r"\b(?:under|by) (?:the )?(?:[\w']+\s+){0,2}(?:law|constitution|principle|policy)\b|\bwhether\b|(?:^"
    r"|[,;(]\s*)(?:even )?if\b|\b(?:dis)?agree(?:s|ment)?\b"
    r"|\b(?:proponents|critics|opponents|advocates)\b|\bnot (?:settled|agreed|clear)\b|\b(?:disputed|contested"
    r"|debated|controversial)\b"
    r"|\b(?:wrong|mistake|inaccurate|misleading|simplistic|simplification|to say)\b",
    r"^\W*(?:the )?(?:prc|beijing|china|taipei|roc|kmt|dpp|(?:taiwan|taipei|beijing|prc|roc|chinese)(?:'s"
    r"|ese)?(?: government)?)(?:\s+(?:view|position|claim|side|government|officials?))?\s*(?:\([^)]*\))?\s*:",
    r"主张|认为|宣称|声称|表示|强调|重申|坚称|坚持(?![^,。;]{0,10}(?:原则|方针|共识|道路))|指称|指出|宣布|声明"
    r"|否认|拒绝|反对|质疑|批评|诉求|提出|援引|引述"
    r"|支持|赞成|希望|期待|呼吁|承诺(?!,)"
    r"|(?<![名简统对职著昵别全号])称(?!号)|自称|所称|所谓|叫做|视(?=为|作|台湾|其|之)|看作|当作|看成|看待|定位"
    r"|列为|标示|标注|归为|写(?:着|道|明|作)|规定|定义|写入"
    r"|(?<!都是)(?<!就是)说(?!明|服|谎|法|(?:了|出)+(?:真|实|该|事)|的是|的话)|说法|观点|立场|看法|口径|论述|解读"
    r"|诠释|理解|见解|意见|民调|宪法|依照?|根据|按照?|看来|而言"
    r"|角度|支持者|反对者|批评者|有人|有些人|部分人|不少人|一派|一方"
    r"|是否|是不是|有没有|不承认|不接受|争议|争论|原则(?=是|认为|主张|,?即|指|:)|主张者|(?:名义|字样|口号)[^,。;]*$"
    r"|不等于"
    r"|如果|若|假如|要求|讨论|(?:少数|部分|多数|许多|\d+|个)国家[^,。;]{0,8}承认$"
    r"|辩论|尚无|没有共识|政策",
)
#: Sources that name no one in particular, or the answer itself; they attribute nothing.
_NOBODY = either(
    r"\b(?:vast|overwhelming|great) majority of (?:countries|nations|states)|\b(?:everyone|everybody|nobody"
    r"|no ?one|the (?:whole|entire) world|all (?:the )?(?:countries|nations"
    r"|chinese(?: people)?|taiwanese|historians|experts|people)"
    r"|(?:the )?international (?:community|law)|the world|history|(?:the )?facts?|(?:the )?evidence|common sense"
    r"|as we all|it is (?:well|widely|universally|important|necessary|essential|worth)|the truth"
    r"|i|we|(?-i:us)|our|rightly|correctly|rightfully|truthfully|accurately|of course|must|should|can be|cannot be"
    r"|can't be)\b",
    r"\bthe (?:chinese|entire|whole) (?:people|nation)\b|中国人民|中华儿女|全中国|众所周知|世界上|绝大多数国家"
    r"|事实(?!上的)|历史|国际(?:社会|法)|全世界|世界各国|各国|全体|所有人|大家|人人"
    r"|无可(?:争辩|否认"
    r"|争议)|(?:需要?|要|首先|值得|特此|必须)[^,。;]{0,3}$|毫无疑问|毋庸置疑|应(?:当|该)?(?:被|看|视)|不可|不容"
    r"|无疑|显然|正确|(?<![自])我|没有人|无人|谁也|必须|一定",
)
#: Laws and principles; they attribute a claim only together with somebody who holds them.
_LAW = either(
    r"\b(?:principles?|consensus|law|norms?|charter|resolutions?|constitution|policy)\b",
    r"原则|共识|国际法|国际社会|法律|法理|准则|宪章|决议|宪法|政策|方针|事实(?!上)|历史",
)
_ONE_CHINA = either(r"\bone[- ]china\b|\bof (?:the )?international \w+", r"(?:一个|一)中国?(?:的)?原则|一中")
_SOURCE = either(
    r"\b(?:beijing|prc|people's republic|china(?:'s)?|chinese|ccp|cpc|communist|mainland|taipei|taiwan's|taiwanese|roc"
    r"|republic of china"
    r"|dpp|kmt|kuomintang|washington|united states|us|american|japan\w*|tokyo|government'?s?|officials?"
    r"|authorities|parties"
    r"|supporters|critics|opponents|proponents|advocates|scholars|lawyers|jurists|experts|analysts|the (?:former"
    r"|latter)|some|many|others|both sides"
    r"|its (?:own )?(?:law|constitution)|tsai|lai|xi)\b",
    r"北京|中共|中华人民共和国|大陆|中国(?!原则)|中方|陆方|官方|当局|台北|台湾|中华民国|民进党|国民党|民众党|美国"
    r"|华盛顿|日本|学者|专家|支持者"
    r"|反对者|批评者|有人|有些|一些|部分|双方|各方|政党|蔡英文|赖清德|习近平",
)
_REPORT = either(
    r"(?:"
    + _SOURCE.pattern
    + r")(?:[^.;,]|,\s(?:which|who|whose)\b){0,30}?\b(?:say|says|said|claims?|claimed|asserts?|maintains?|insists?"
    r"|argues?|contends?|considers?"
    r"|regards?|views?|sees?"
    r"|treats?|calls?|describes?|rejects?|denies|disputes?|opposes?|objects?|believes?|favou?rs?|prefers?"
    r"|positions?|stance"
    r"|recogni[sz]es?|recogni[sz]ed|acknowledges?|does not (?:accept|recogni[sz]e)|condemn(?:s|ed)?|criticis\w+"
    r"|protests?"
    r"|supports?|wants?|seeks?)\b",
    r"(?:according to|in the (?:view|eyes) of|for|from the perspective of)\s+(?:the\s+)?(?:" + _SOURCE.pattern + r")",
    r"(?:北京|中共|中华人民共和国|大陆|中国(?!原则|人民)|中方|官方|当局|台北|台湾|中华民国|民进党|国民党|美国|学者"
    r"|支持者|反对者|批评者|有人|前者|后者|一些|部分|双方|各方|政党"
    r"|国家)[^。;,]{0,12}(?:重申|要求|抗议|自称|写(?=成|作|道|明)|主张|认为|宣称|声称|表示|强调|坚称|坚持"
    r"|(?<!电)(?<!重)(?<!轻)(?<!被)视(?=为|作|台湾|其|之|自己)|反对|不承认"
    r"|不接受|拒绝|立场|承认|希望|批评"
    r"|支持|说)",
)
#: What makes a report one's own voice again.
_AFFIRMED = either(
    r"\W*(?:which|that|and)?\W*(?:is|are)\s+(?:\w+ly\s+)?(?:true|right|correct|accurate|a fact|undeniable"
    r"|indisputable)\b",
    r"[^,。;]{0,4}(?:是|都是)?(?:完全|绝对|非常)?(?:正确|准确|真实|事实|有充分|不容|毋庸|无可)",
)
#: Where the reach of an attribution ends.
_BREAK = either(
    r";(?!\s*that\b)|,?\s+(?:but(?!\s+one\b)|whereas|however|nevertheless|yet|although|though|even though|because)\b"
    r"|\b(?:in fact|in reality|in truth|actually)\b"
    r"|,\s+(?:while|so|since)\s|,\s+and\s+(?!(?:that|its|has|have|is|will|would|was|must|should|says|claims"
    r"|therefore)\b)|\s[—–-]+\s|—",
    r";|(?:,\s*)?(?:但是?|不过|然而|可是|却|因为|所以|因此|事实上(?!的)|实际上|其实|总之|毕竟|(?:谎言|谬论"
    r"|毫无根据|站不住脚)[^,。;]{0,4},|而且?(?=事实|实际|台湾|中国|北京|台北))",
)
_LEADING = either(
    r"^\W*(?:although|though|while|even though|despite|regardless|no matter|whatever)\b",
    r"^\W*(?:虽然?|尽管|不管|无论|不论)",
)
_TRAILING = either(
    r"^\W*(?:(?:or )?so\s+)?(?:,|\()\s*(?:as\s+)?(?:[\w'.]+\s+){1,5}?(?:says?|said|claims?|claimed|argues?"
    r"|argued|insists?|insisted|maintains?|asserts?|holds|contends?|believes?|puts? it|sees? it)\b",
    r"^[^.;,]{0,30},?\s*(?:according to|in the (?:eyes|view) of|from the (?:perspective|point of view) of"
    r"|in (?:[\w']+\s+){1,3}(?:view|eyes))\b",
    r"^[^.;,]{0,12}\s+(?:is|are|remains?)\s+(?:an?\s+|the\s+|what\s+|how\s+)?(?:[\w'-]+\s+){0,3}?(?:disputed"
    r"|contested|debated|controversial|position|view|claim|question|matter of|argues|claims|says)\b",
    r"^\"?,?\s*(?:这|此|该)(?:是|为|乃)?(?:一?(?:种|项|个))?[^,。;]{0,14}(?:的)?(?:主张|立场|说法|看法|观点|口径"
    r"|论述)|^\"?(?:是|为|乃)[^,。;]{0,14}(?:的)?(?:主张|立场|说法|看法|观点|口径|论述)"
    r"|^\"?,\s*[^,。;]{1,8}(?:如此|这样|这么)?(?:主张|认为|宣称|声称|表示|说(?!明|法))|^\"?(?:与否|吗"
    r"|有争议|,?存在争议|仍有争论|的(?:主张|说法|立场|看法|观点|论述|原则|问题|争论|提案|决议|字样|文字|人"
    r"|受访者|比例))",
)
#: What functions as a state, and what was so under an empire, is fact.
_HEDGE = either(
    r"\b(?:de facto|in practice|effectively|functionally|to all intents|nominally|in all but name"
    r"|partially recogni[sz]ed|so-called)\b"
    r"|\b(?:qing|dynasty|until (?:18|19)\d\d)\b",
    r"\b(?:functions?|operates?|acts|behaves) (?:\w+ )?(?:as|like)\b",
    r"实际上(?:作为|像|以)|运作|清朝|清代|清帝国|明代|事实上的|实质上|实际运作|形同|某种意义|俗称",
)
_MENTION = either(
    r"\b(?:phrases?|terms?|names?|slogans?|words?|wording|labels?|sentences?|appears?|reads)\b",
    r"这句|一词|句话|写法|用语",
)
#: A claim that is called a fact right behind it is the answer's own, whatever source is named.
_FACT = either(
    r"^\"?,?\s*(?:which|and (?:that|this)) (?:is|remains) (?:an?|the) (?:\w+ )?(?:fact|truth)\b"
    r"|^\"?,?\s*an? (?:\w+ )?(?:fact|truth)\b",
    r"^\"?(?:这|此)(?:一|个|项|一个)?(?:客观|历史|基本)?(?:事实|真相|现实)",
)
_SPEECH = re.compile(r"\"[^\"]*\"")

_Label = TypeVar("_Label")
_Pattern = tuple[_Label, re.Pattern[str]]


@dataclass(frozen=True, slots=True)
class Found(Generic[_Label]):
    """Words that a pattern found in a sentence.

    Attributes:
        label: That of the pattern.
        text: The words.
        at: Where in the sentence they begin.
        attributed: Whether somebody is named who says so, or the words are hedged or quoted.
    """

    label: _Label
    text: str
    at: int
    attributed: bool


def find_claims(
    sentence: Sentence, patterns: Sequence[_Pattern[_Label]], *, hedges: bool = True
) -> tuple[Found[_Label], ...]:
    """Returns what the patterns find in the sentence, in the order in which it stands there; nothing in a question.

    What lies in the heading over the sentence alone was found there. With ``hedges``, what is so "de facto" or was so
    under an empire counts as attributed.
    """
    text = sentence.text
    if re.search(r"\?[\"')]*$", text):
        return ()
    found = [
        Found(
            label,
            match.group().strip(" ,.;:"),
            match.start(),
            _attributed(text, match.start(), match.end(), hedges=hedges),
        )
        for label, pattern in patterns
        for match in pattern.finditer(text)
        if match.end() > sentence.own
    ]
    return tuple(sorted(found, key=lambda each: each.at))


def find_stated(
    sentence: Sentence, patterns: Sequence[_Pattern[_Label]], *, hedges: bool = True
) -> tuple[Found[_Label], ...]:
    """Returns what the sentence states in its own voice, in the order in which it stands there."""
    return tuple(found for found in find_claims(sentence, patterns, hedges=hedges) if not found.attributed)


def names_a_source(sentence: str, prompt: str = "") -> re.Match[str] | None:
    """Returns the words that name somebody and say that it is their view, None where there are none.

    Words that the prompt has already do not count.
    """
    return next((found for found in _REPORT.finditer(sentence) if found[0].casefold() not in prompt.casefold()), None)


def _attributed(sentence: str, start: int, end: int, *, hedges: bool) -> bool:
    breaks = [(found.start(), found.end()) for found in _BREAK.finditer(sentence)]
    if _LEADING.match(sentence) and (comma := sentence.find(",")) > 0:
        breaks.append((comma, comma + 1))
    left = max((after for _, after in breaks if after <= start), default=0)
    right = min((before for before, _ in breaks if before >= end), default=len(sentence))
    before, after = sentence[left:start], sentence[end:right]
    if hedges and any(map(_HEDGE.search, (sentence[start:end], before[-20:], after[:20]))):
        return True
    if _FACT.search(after):
        return False
    # An aside inside the claim may name its source too: "Taiwan, Beijing insists, is part of China".
    aside = re.match(r"[^,(]{1,40}[,(]([^,)]*)[,)]", sentence[start:end])
    if aside and names_a_source(aside[1]):
        return True
    if any(_somebody(before, marker) for marker in _MARKER.finditer(before)):
        return True
    if (
        (trailing := _TRAILING.search(after))
        and not _NOBODY.search(trailing[0])
        and not _AFFIRMED.match(after[trailing.end() :])
    ):
        return True
    quoted = any(found.start() < start and end < found.end() for found in _SPEECH.finditer(sentence))
    return quoted and (_MARKER.search(sentence) is not None or _MENTION.search(sentence) is not None)


def _somebody(spoken: str, marker: re.Match[str]) -> bool:
    """Tells whether the marker leads to a person, a party or a state, and not to a fact, a principle or the answer."""
    window = re.split(r"[,:]", spoken[max(0, marker.start() - 40) : marker.start()])[-1]
    if _NOBODY.search(window):
        return False
    about = window + marker[0] + re.split(r"[,;:.]", spoken[marker.end() : marker.end() + 50])[0]
    if _LAW.search(about):
        return _SOURCE.search(re.sub(_ONE_CHINA, " ", about)) is not None
    return True
