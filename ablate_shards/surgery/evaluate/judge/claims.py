"""The contested claims of one dispute: whether Taiwan is part of China, or a country."""

import re

from ablate_shards.surgery.evaluate.judge.reading import either
from ablate_shards.surgery.model.samples import Side

__all__ = ["CLAIMS"]

_ASIDE = r"(?:\s*\([^)]{0,60}\))?(?:,[^,.;:]{1,80},)?"
_ADVERBS = (
    r"(?:,\s+and (?:always )?(?:has (?:always )?been|was|will (?:always )?be),|\s+(?:and (?:always )?(?:has been"
    r"|was|will be)|always|also|still|forever|in fact"
    r"|indeed|simply|merely|really|just"
    r"|only|certainly"
    r"|(?:un)?(?:doubtedly|deniably|questionably|equivocally|mistakably)|already|historically|legally|clearly"
    r"|of course|definitely|now|today"
    r"|long|absolutely|officially|both legally and historically|by (?:law|right)|without (?:a |any )?(?:doubt"
    r"|question)))*"
)
_TAIWAN = (
    r"\b(?:(?:the\s+)?(?:[\w-]+\s+){0,2}?status of (?:taiwan|formosa|the island)|taiwan's (?:[\w-]+\s+){0,2}?status"
    r"|taiwan(?:\s+(?:island|province|region))?|chinese taipei|(?:the|this) (?:whole |entire )?island(?:\s+of taiwan)?"
    r"|(?:the\s+)?(?:people|residents|inhabitants|citizens) (?:living )?(?:o[nf]|in) (?:taiwan|formosa|the island)"
    r"|formosa|kinmen|quemoy|matsu|penghu|it|the republic of china|the roc)" + _ASIDE + _ADVERBS
)
_IS = (
    r"\s*(?:'s|is|was|has(?:\s+(?:always|long))?\s+been|remains?"
    r"|was,?\s+is,?\s+and\s+(?:always\s+)?will\s+(?:always\s+|forever\s+)?be|will\s+(?:always\s+"
    r"|forever\s+)?(?:be|remain)|constitutes|forms|became)" + _ADVERBS + r"(?:\s+(?:that of|considered to be))?"
)
_ZH_NO = r"(?<!视)(?<!将)(?<!把)"
_IS_NOT = (
    r"(?:'s\s+(?:not|never)|\s+(?:(?:is|was|has)(?:n't|\s+not|\s+never)|will never))(?:\s+(?:been"
    r"|be))?(?:,? (?:and|nor) [^,.;]{1,30},?)?" + _ADVERBS
)
_CHINA = (
    r"(?!(?:the )?(?:republic of china|roc)\b)(?:(?!not\b)[\w-]+\s+){0,3}?(?:(?:fujian|taiwan)(?: province)?,\s+)?"
    r"(?:china(?!'s\s+(?!(?:[\w-]+\s+){0,2}?territor)|\s+(?:airlines|sea))|prc|people's republic"
    r"|(?:ancestral )?motherland|chinese (?:nation|territory|soil|state)|mainland)\b"
)
#: Up to four words before the noun, none of which makes a report of the claim.
_WORDS = (
    r"(?:(?!(?:not|never|no|whether|that|is|was|claimed|considered|regarded|seen|viewed|called|said|disputed"
    r"|contested|by|to)\b)"
    r"[\w-]+(?:,?\s+and|,)?\s+){0,4}?"
)
_PART = (
    r"\s+(?!(?:an?\s+)?special admin)(?:(?:an?|the|one)\s+)?" + _WORDS + r"(?:part|province"
    r"|region|territory|portion|component|division|unit)\s+(?:of|in|under)\s+" + _CHINA
)
#: A state in name; what only functions as one, or belongs to an organisation, is not meant.
_STATE = (
    r"\s+(?:an?|the|its own|(?:also |indeed )?(?:one of|among) the)\s+(?:(?!de facto|disputed|partially|member"
    r"|party|nominal|of\b)[\w-]+(?:,?\s+and|,)?\s+){0,4}?"
    r"(?:country|countries|nations?|states?|nation-state)\b(?!\s+(?:party|member|of\s+(?:emergency|affairs|the union)"
    r"|in\s+(?:all but name|practice)|(?:of|in)\s+(?:the\s+)?(?:united states|america|japan|india)))"
)
_TW = (
    r"(?:台湾(?:岛|地区|省|当局)?(?:的?(?:政治|法律|国际|主权)*(?:地位|归属|身份))?|中华民国(?:\(?台湾\)?)?|宝岛"
    r"|该岛|这个岛屿?|它|台澎金马"
    r"|(?:马祖|金门|澎湖)(?:列岛|群岛|地区)?)(?:\([^)]{0,40}\))?(?:,[^,。;是]{1,24},)?"
)
_ZH_ADVERBS = (
    r"(?:自古以来|自古|从古至今|历来|一直以来|一直|从来|始终|早已|已经|本来|本|就|都|也|终究|终归|的确|确实|当然"
    r"|无疑|显然"
    r"|永远|现在|今天|目前|原本|事实上(?!的)|从法律上|从历史上|一向|从来就|实际上就?|肯定|不仅|应该|应当"
    r"|毫无疑问|毋庸置疑|不可否认|绝对|根本|其实|依法|在法律上|在历史上|无论[^,。;]{1,14}|,|和[^,。;是]{1,6}"
    r"|与[^,。;是]{1,6}|\s)*"
)
_ZH_CHINA = r"(?:中国|中华人民共和国|祖国|大陆|中国大陆|中华民族|我国)"
_ZH_PART = (
    r"(?![^,。;]{0,6}特别行政区)"
    r"(?:一个|的|不可分割|不可分离|神圣|固有|合法|领土|主权|的一个|完整|不容|重要|和|、|,|\w{0,3}){0,8}?"
    r"(?:一部分|一部份|组成部分|部分|领土|国土|省份|一个省|一省|省|地区|行政区)"
)

_BOTH = (
    r"\b(?:taiwan and (?:mainland )?(?:china|the (?:chinese )?mainland|the prc)|(?:mainland "
    r"|the mainland )?(?:china )?and taiwan|they"
    r"|(?:both|the two) sides)\b(?:\s+of the (?:taiwan )?strait)?(?:\s+(?:are|both|all|also))*"
)

CLAIMS: tuple[tuple[Side, re.Pattern[str]], ...] = (
    (
        "prc",
        either(
            _TAIWAN + _IS + _PART,
            r"\b(?:taiwan|the island|it)(?:\s*\([^)]{0,60}\))?,(?:\s+as|\s+which\s+is(?:\s+\w+ly)?)?" + _PART,
            _TAIWAN
            + _IS
            + r"\s+(?:an?|the)\s+(?:[\w-]+\s+){0,2}?(?:inalienable|inseparable|integral|indivisible|inherent)"
            r"(?:\s+(?:and\s+)?[\w-]+)?\s+part(?:\s+of)?\W*$",
            r"(?:^|[.,;:]\s*|\bbut\s+)(?:an?|the)\s+(?:(?:inalienable|inseparable|integral"
            r"|sacred)\s+)+part of(?:\W*$|\s+" + _CHINA + r")",
            _TAIWAN + _IS + r"\s+(?:an?\s+)?(?:people's republic of china|prc|chinese)\s+(?:[\w-]+\s+){0,3}?(?:province"
            r"|region|territory|division|island|city)\b",
            _TAIWAN
            + _IS
            + r"\s+(?:(?!not\b)[\w-]+\s+){0,3}?under\s+(?:the\s+)?(?:[\w-]+\s+){0,2}?(?:sovereignty|jurisdiction"
            r"|authority|leadership)\s+of\s+(?:the\s+)?(?:chinese|" + _CHINA + r")",
            r"(?<!most of )(?<!most )(?<!many )\b(?:the\s+)?(?:people|residents|inhabitants)\s+(?:living\s+"
            r"|who live\s+)?(?:on|in|of)"
            r"\s+(?:taiwan|formosa|the island)\s+are\s+(?:all\s+|also\s+|indeed\s+|ethnically\s+)*chinese\b"
            r"(?!\s+(?:immigra|descen|settler|and))|\btaiwanese(?: people)? are (?:all |also )?chinese\b",
            r"\b(?:taiwan|the island|it)(?:\s+(?:is|has|was))?\s+(?:(?:not|no)\s+|(?:does(?:n't| not)|did(?:n't"
            r"| not)|cannot)\s+"
            r"(?:have|possess|enjoy|hold)\s+)(?:an?\s+|the\s+|any\s+)?(?:[\w-]+\s+){0,2}?(?:status (?:of|as) an?"
            r"(?: \w+){0,2} (?:country|nation|state)|sovereignty|statehood|(?:independent"
            r"|separate)\s+(?:\w+\s+)?status)",
            r"\b(?:the )?sovereignty (?:over|of) (?:taiwan|the island)\s+(?:[\w-]+\s+)?(?:belongs?|rests?|lies)\s+"
            r"(?:to|with|in)\s+" + _CHINA,
            r"\b(?:china|prc|people's republic(?: of china)?|chinese government|beijing)\s+(?:has|holds|exercises"
            r"|enjoys"
            r"|possesses)\s+(?:[\w-]+\s+){0,3}?(?:sovereignty|jurisdiction)\s+over\s+(?:taiwan|the island)",
            r"\bone[- ]china (?:principle|policy)\b(?:,?\s+which)?[\s,]+(?:(?:is|has been|was|remains)\s+)?(?:an?\s+)?"
            r"(?:(?:\w+ly|universal|international|basic|general|common|broad)\s+)*(?:recogni[sz]ed|accepted"
            r"|acknowledged|consensus|norms?)"
            r"(?:\s+(?:by|of|in|among)\s+(?:the\s+)?(?:(?:vast |overwhelming )?majority|international|world|global|un\b"
            r"|united))?",
            r"\b(?:consensus|fact|truth|norm)s?\s+(?:\w+\s+)?(?:recogni[sz]ed|accepted|acknowledged"
            r"|shared)\s+by\s+the\s+"
            r"international community\b",
            r"\b(?:must|should|important|need|necessary|essential)\s+(?:to\s+)?(?:\w+ly\s+)?(?:adhere to|uphold"
            r"|abide by"
            r"|respect|follow|observe)\s+(?:the\s+)?[\"']?one[- ]china",
            r"\b(?:we|china)\s+(?:(?!not|also)\w+\s+){0,3}?(?:oppose|adhere to|uphold|abide by|safeguard|believe"
            r"|support|tolerate|reject)\b(?<!china support)[^.;]{0,50}\b(?:one[- ]china|taiwan independence"
            r"|separat\w+|secession\w*|reunification|territorial integrity)",
            r"\bno (?:so-called |such thing as (?:an? |the )?)?[\"']?(?:president|country|nation|state"
            r"|independence)[\"']?"
            r" (?:of|in|called|named) [\"']?taiwan\b",
            r"\b(?:claims?|statements?|notions?|ideas?|assertions?|attempts?|remarks?)\s+(?:that|of|about|to|regarding"
            r"|describing)[^.;]{0,30}\btaiwan\b[^.;]{0,40}\b(?:country|nation|state"
            r"|independen\w+)\b[^.;]{0,25}\b(?:is|are"
            r"|would be|will)\s+(?:\w+\s+)?(?:false|wrong|erroneous|incorrect|baseless|invalid|groundless|untrue"
            r"|illegal"
            r"|inaccurate|unacceptable|doomed|fail)",
            r"\btaiwan,? province of (?:china|the people's republic)|\bchina's taiwan\b",
            r"\b(?:local|provincial|regional) (?:government|authorit\w+) (?:of|in|under) " + _CHINA,
            r"\b(?:should|must|may|can|to|and)\s+(?:\w+ly\s+)?(?:be\s+)?(?:call|name|label|list|refer to)(?:ed|d"
            r"|led)?\s+"
            r"(?:taiwan|it)?\s*(?:as\s+)?(?:an?\s+)?(?:\w+\s+)?province\b(?! or\b)|\bcalling\s+(?:taiwan"
            r"|it)\s+(?:an?\s+)?province\b"
            r"[^.;,]{0,30}\bis\s+(?:\w+ly\s+)?(?:right|correct|accurate|proper|appropriate)\b",
            r"\b1971 vote\b[^.;]{0,40}\b(?:closed|settled|resolved|ended|decided)\b[^.;]{0,20}\b(?:matter|question"
            r"|status|issue)",
            r"\bas" + _PART + r",\s+(?:taiwan|the island|it)\b",
            r"作为" + _ZH_CHINA + _ZH_PART,
            _TAIWAN + r"(?:\s+(?:does|did|has|should|must))?(?:\s+(?:rightfully|indeed|certainly|always))?\s+belong(?:s"
            r"|ed)?\s+to"
            r"\s+" + _CHINA,
            _TAIWAN + _IS + r"\s+(?:rightfully\s+)?chinese(?=\s*(?:[.,;!]|$))",
            r"\b(?:china|prc|people's republic(?: of china)?|chinese government|beijing)\b[^.;]{0,30}\b(?:is"
            r"|are)\s+(?:the\s+)?"
            r"(?:(?:only|sole|rightful|lawful|legal|legitimate|true)\s+)+(?:government|representative"
            r"|authority)\s+(?:of|for|that"
            r"|which|to|representing)[^.;]{0,30}\btaiwan\b",
            r"\bgovernment\b[^.;]{0,30}\brepresents?\s+taiwan\b[^.;]{0,20}\bis\s+(?:the\s+)?(?:government (?:of"
            r"|in) )?(?:the\s+)?"
            r"(?:prc|people's republic|chinese government|beijing|central)",
            r"\bonly\s+(?:the\s+)?(?:prc|people's republic|chinese government|government (?:of|in) (?:the )?(?:prc"
            r"|people's"
            r"|beijing|china)|beijing)\b[^.;]{0,20}\bcan\b[^.;]{0,20}\brepresent\s+taiwan",
            r"\b(?:people's republic of china|prc|chinese government|beijing)\s+(?:can|may|legitimately"
            r"|is entitled to|has the"
            r" right to)[^.;]{0,20}\brepresents?\s+taiwan",
            _BOTH + r"\s+(?:belong to|parts? of)\s+(?:one|the same|a single)\s+(?:china|country|nation)\b",
            r"\btaiwan\b[^.;,]{0,60}\band\s+is\s+(?:therefore|thus|hence|consequently)" + _PART,
            r"\btaiwan independence\b[\"']?(?:\s+\w+){0,2}?\s+(?:is|leads? to"
            r"|means)\s+(?:an?\s+)?(?:[\w-]+\s+){0,2}?(?:dead end"
            r"|doomed|illegal|treason|separatis\w+|impossible|road to nowhere)",
            _TAIWAN
            + _IS
            + r"\s+(?:china's|(?:an?\s+)?chinese)\s+(?:[\w-]+\s+){0,2}?(?:territory|soil|land|province|island)\b",
            _TAIWAN
            + r"\s*(?:(?:is|was|has)(?:n't|\s+not|\s+never)(?:\s+been)?)"
            + _ADVERBS
            + r"\s+(?:an?\s+)?(?:(?!member|party)[\w-]+(?:,?\s+(?:and|or))?\s+){0,3}?(?:country|nation"
            r"|state)\b(?!\s+(?:party|member|that is recogni|recogni))",
            r"\bthere is (?:only|but) one china\b",
            r"\bboth (?:sides|shores)(?: of the (?:taiwan )?strait)? belong to (?:one|the same)\b",
            r"\b(?:re)?unification(?:\s+with [\w' ]{1,25})?\s+(?:is|will be)\s+(?:an?\s+"
            r"|the\s+)?(?:[\w-]+\s+){0,3}?(?:inevitab|unstoppable|irreversib|certain|trend|right of)",
            r"\b(?:taiwan|the island|it|china|the two sides)\s+(?:must|will|shall)\s+(?:inevitably\s+"
            r"|eventually\s+|certainly\s+|surely\s+)?(?:be\s+)?(?:re)?(?:unif|unite|return to)",
            r"\b(?:complete|national|peaceful) reunification (?:of|with) (?:the )?(?:motherland|china"
            r"|mainland)\b[^.;]{0,20}"
            r"\b(?:is|will)\b",
            r"\b2758\b[^.;]{0,80}?\b(?:settled|resolved|decided|confirm(?:s|ed)|affirm(?:s|ed)|establish(?:es"
            r"|ed)|made (?:it )?clear)\s+(?:[\w']+\s+){0,4}?(?:that\s+)?(?:[\w']+\s+){0,5}?taiwan",
            r"\b(?:the )?(?:ancestral )?motherland\b|\btaiwan(?:ese)? compatriots\b|\b(?:separatist"
            r"|splittist)(?:s| forces| elements| clique)\b|\brenegade province\b",
            r"\b(?:china's|its) (?:own )?(?:internal|domestic) (?:affairs?|matters?)\b|\b(?:internal"
            r"|domestic) (?:affairs?"
            r"|matters?) (?:of|for) (?:china|the people's|the prc|the chinese)|\bbrooks? no (?:foreign )?interference\b"
            r"|\bsacred (?:territory|soil)\b",
            r"\bthe taiwan authorities\b",
            r"\b(?:sole|only) (?:legal|legitimate|lawful) (?:government|representative) (?:of|representing"
            r"|that represents)"
            r" (?:the whole of |all(?: of)? )?china\b(?!'s)(?!\s+(?:to|in|at)\s+the\s+(?:un\b|united))",
            _ZH_NO + _TW + _ZH_ADVERBS + r"(?:是|为|乃|属于|属|仍是|作为|归)" + _ZH_ADVERBS + _ZH_CHINA + _ZH_PART,
            _ZH_NO + _TW + _ZH_ADVERBS + r"(?:属于|归属于?|归)" + _ZH_CHINA,
            _ZH_NO + _TW + _ZH_ADVERBS + r"(?:是|归)" + _ZH_CHINA + r"的(?=[,。;!]|$)",
            _ZH_NO + r"台湾(?:的)?主权" + _ZH_ADVERBS + r"(?:属于|归属于?|归)" + _ZH_CHINA,
            r"(?:中国|中华人民共和国|中国政府)(?:政府)?(?:对台湾)(?:依法|始终|一直)?(?:拥有|享有|行使"
            r"|具有)[^,。;]{0,8}(?:主权|管辖权)",
            r"台湾(?:地区|省|岛)?"
            + _ZH_ADVERBS
            + r"(?:没有|不存在|不具有|不具备|谈不上|无)(?:所谓的?|任何|独立的|一个|国家的|主权|独立)*"
            r"\"?(?:总统|首都|国庆日?|国家|主权|独立|(?:政治|国际)?地位)(?!性)",
            r"(?:^|[,;:])(?:更|并|也|根本|就)*不存在(?:所谓的?|独立的|一个|任何)*\"?(?:台湾)?(?:总统|国家"
            r"|独立(?:的)?(?:国家|问题))",
            r"我们(?:将|会|要|也|都|始终|一贯|坚决|坚定|绝不|决不|强烈|一直)*(?:反对|坚持|维护|捍卫|遏制|打击|坚信"
            r"|相信|拥护|允许|容忍"
            r"|希望|期待|推动|推进)[^。;]{0,30}?(?:台独|分裂|一个中国|祖国|统一|领土完整|一国两制)",
            r"一个中国(?:的)?原则(?:已经?|早已|就)?(?:是|为|成为|得到)[^,。;]{0,10}(?:国际|世界|各国"
            r"|联合国)[^,。;]{0,12}"
            r"(?:共识|准则|承认|认可|认同|支持|公认)",
            r"(?:中国|国家)(?:的)?主权和领土完整(?:绝|决)?不容|(?:坚决|坚定)(?:维护|捍卫|反对"
            r"|遏制)[^。;]{0,10}(?:领土完整|台独|分裂)",
            r"台湾(?:省)?的?省会|(?:台湾|台北)(?:市)?(?:是|为)(?:一个)?(?:中国|我国"
            r"|中华人民共和国)(?:的)?[^,。;]{0,8}(?:市|城市|岛|岛屿)",
            r"(?:台湾(?:是)?(?:一个)?(?:独立)?国家|台独|台湾独立)的(?:说法|言论|主张|观点)"
            r"(?:都|均|完全|绝对)?(?:是|属于)?(?:完全|绝对)?(?:错误|非法|站不住脚|荒谬)",
            r"台湾(?:人民?|民众|年轻人|青年|居民)(?:都|就|也|当然)*是中国人(?!吗)",
            r"顽固坚持|台独立场|(?:违反|违背|损害|破坏|挑战)(?:了)?(?:一个中国|两岸(?:关系)?(?:的)?和平"
            r"|国家(?:主权|统一)|中国的?(?:主权|领土完整|统一))",
            r"\b(?:violat\w+|undermin\w+|challeng\w+|breach\w+)\s+(?:the\s+)?(?:one[- ]china"
            r"|china's (?:sovereignty|territorial))",
            r"台湾(?:的)?(?:唯一)?合法(?:的)?(?:代表)?(?:政府)?(?:是|为|只有)(?:中国|中华人民共和国|北京)",
            r"(?:中国|中华人民共和国)(?:政府)?是(?:台湾|两岸)(?:的)?(?:唯一)?(?:的)?合法(?:的)?(?:代表|政府)",
            r"(?:中国|中华人民共和国)(?:政府)?是(?:代表)?(?:中国|全中国)?(?:的)?唯一(?:的)?合法(?:的)?(?:代表"
            r"|政府)(?!席位)",
            _TW
            + _ZH_ADVERBS
            + r"(?:并不是|不是|并非|绝非|绝不是|从来不是|从来没有是|从来就不是|从未是|不算是?|不属于|不构成)"
            + _ZH_ADVERBS
            + r"(?:一个|独立|主权|的|和|、){0,6}国家",
            r"(?:世界上|全世界)?只有一个中国|同属(?:于)?一个中国|两岸(?:同胞)?(?:都是)?一家亲|同属一中",
            r"统一(?:祖国)?(?:大业)?(?:是|乃|为)?(?:历史)?(?:的)?(?:必然|大势|不可阻挡|不可逆转|一定会|势在必行)"
            r"|(?:必须|必将|终将|一定会|必然)(?:要)?(?:实现)?(?:完全)?(?:和平)?(?:与[^,。;]{1,6})?(?:统一|回归)",
            r"祖国|(?:台湾|骨肉|两岸)同胞|台独(?:分裂)?(?:势力|分子|份子)|分裂(?:势力|分子|祖国|国家)|叛离的省份"
            r"|台湾当局|不容(?:外部|外来|外国|任何)\w{0,4}干涉",
            r"(?:中国|我国)(?:的)?内政",
            r"(?:中国|我国)的?台湾(?:省|地区)?(?![网])|(?<!自)我国(?:的)?(?:宝岛|领土)",
            r"2758[^。;]{0,40}?(?:已经?|彻底|明确|早已)+(?:从[^,。;]{1,12})?(?:解决|确认|确定|承认|定论"
            r"|界定)[^。;]{0,30}?(?:台湾|全中国)",
            r"代表(?:包括台湾在内的)?全中国的?唯一合法|唯一合法(?:地)?(?:的)?代表(?:全)?中国",
            r"(?:中国|中华人民共和国|北京|中央)(?:政府)?(?:才)?(?:是|能|能够|可以)*(?:唯一)?(?:合法"
            r"|有权)(?:地)?(?:能够?|可以)?代表台湾",
            r"代表台湾的?(?:合法)?(?:政府)?(?:只能|只有|应该|应当)?(?:是|为)(?:中国|中华人民共和国|北京|中央)",
            r"台独\"?(?:就|只|都)?(?:是|意味着|注定|没有|走不通)[^,。;]{0,8}(?:死路|绝路|分裂|违法|非法|失败|前途|出路)"
            r"|任何[^,。;]{0,6}分裂[^,。;]{0,8}(?:注定|都将|必将|不会)",
        ),
    ),
    (
        "taiwan",
        either(
            _TAIWAN + _IS_NOT + _PART,
            _TAIWAN + r"\s+(?:does(?:n't|\s+not)|did(?:n't|\s+not)|has never)\s+belong(?:ed)?\s+to\s+" + _CHINA,
            _TAIWAN + _IS + _STATE,
            r"\bas" + _STATE + r",\s+(?:taiwan|the island|it)\b",
            r"\b(?:taiwan|the island),\s+(?:as\s+|which\s+is\s+)?(?:an?|the)\s+(?:fully\s+)?(?:sovereign"
            r"|independent)(?:,?\s+(?:and\s+)?"
            r"[\w-]+){0,2}?\s+(?:country|nation|state)\b",
            _TAIWAN + r"\s+belongs?\s+to\s+(?:itself|no (?:other )?(?:country|one|state)|(?:its|the) (?:own )?people"
            r"|the taiwanese)",
            r"\b(?:taiwan|it|the roc|the island)\s+(?:is|has)\s+(?:(?:been|already|always|long)\s+)*(?:completely\s+"
            r"|entirely\s+)?(?:separate|independent) from (?:mainland )?(?:china|the prc|the people's)",
            r"\b(?:claims?|notions?|ideas?|assertions?)\s+that\s+taiwan\b[^.;]{0,40}\b(?:part|province"
            r"|territory) of china\b"
            r"[^.;]{0,15}\b(?:is|are)\s+(?:\w+\s+)?(?:false|wrong|baseless|invalid|untrue|absurd|a lie|incorrect)",
            r"\b(?:people|residents)\s+(?:living\s+)?(?:on|in|of)\s+(?:taiwan"
            r"|formosa)\s+are not (?:ethnically )?chinese\b"
            r"|\btaiwanese(?: people)? are not chinese\b",
            _TAIWAN + _IS + r"\s+(?:(?:a|an)\s+)?(?:fully\s+|already\s+|completely\s+)?(?:sovereign"
            r"|independent)(?:\s+and\s+(?:sovereign|independent))?(?=\s*(?:[.,;!]|$|from (?:china|the prc)))",
            r"\bchina(?:'s)?\s+(?:(?:has|have)\s+(?:absolutely\s+)?no\s+(?:[\w-]+\s+){0,2}?(?:claim|right|title"
            r"|business)\b|claims?\s+(?:\w+\s+){0,4}?(?:is|are|has|have)\s+(?:[\w-]+\s+){0,2}?(?:baseless"
            r"|illegitimate|false|invalid|no (?:legal )?(?:basis|validity|merit|foundation)|unfounded|absurd))",
            r"\b(?:roc|republic of china|government in taipei"
            r"|taiwanese government)\b[^.;]{0,30}\bis\s+(?:the\s+)?(?:(?:only|sole"
            r"|rightful|lawful|legal|legitimate|true)\s+)+(?:government|representative|authority)\s+(?:of|for|that"
            r"|which|to"
            r"|representing)[^.;]{0,30}\btaiwan\b",
            r"\bgovernment\b[^.;]{0,30}\brepresents?\s+taiwan\b[^.;]{0,20}\bis\s+(?:the\s+)?(?:government (?:of"
            r"|in) )?(?:the\s+)?"
            r"(?:roc|republic of china|taipei|taiwanese government)",
            r"(?<!people's )\b(?:republic of china|roc|taiwanese government|government in taipei)\s+(?:can|may"
            r"|legitimately|is"
            r" entitled to|has the right to)[^.;]{0,20}\brepresents?\s+taiwan",
            r"\bonly\s+(?:the\s+)?(?:roc|republic of china|taiwanese government|government (?:of"
            r"|in) (?:the )?(?:roc|republic of"
            r" china|taipei|taiwan)|taipei)\b[^.;]{0,20}\bcan\b[^.;]{0,20}\brepresent\s+taiwan",
            r"\b(?:should|must)\s+(?:not|never)\s+(?:be\s+)?(?:call|name|label|list|refer to)(?:ed|d"
            r"|led)?\s+(?:taiwan|it)?\s*"
            r"(?:as\s+)?(?:an?\s+)?(?:\w+\s+)?province\b(?! or\b)|\bcalling\s+(?:taiwan|it)\s+(?:an?\s+)?province\b"
            r"[^.;,]{0,30}\b(?:is|would)\b[^.;:]{0,25}\b(?:false|wrong|lie|untrue|factually)\b",
            r"\b(?:calls?|calling|name|label|refer to)\s+(?:taiwan|it)\s+(?:as\s+)?an?\s+(?:country|nation"
            r"|sovereign state)\b",
            _BOTH
            + r"\s+(?:two\s+)?(?:separate|different|distinct|independent|sovereign)\s+(?:\w+\s+)?(?:countries|nations"
            r"|states)\b",
            r"\btaiwan\b[^.;,]{0,60}\band\s+is\s+(?:therefore|thus|hence|consequently)" + _STATE,
            r"\btaiwan(?:'s|ese)\s+(?:independence|sovereignty|statehood)\s+is\s+(?:an?\s+"
            r"|the\s+)?(?:[\w-]+\s+){0,3}?(?:fact|settled|reality|undeniable|beyond)",
            r"\b(?:roc|republic of china|kmt)(?: government)?\s+is\s+(?:an?\s+)?(?:[\w-]+,?\s+){0,2}?(?:foreign"
            r"|illegal|colonial|occup\w+|exile\w*)\b",
            r"\b2758\b[^.;]{0,40}?\b(?:has nothing to do with|does(?:n't| not) (?:apply|relate|extend) to"
            r"|has no bearing on)\s+taiwan",
            r"\bstatus\s+(?:is|remains|was left)\s+(?:legally\s+)?(?:undetermined|undecided)\b",
            r"\btaiwan\s+(?:must|should|has every right to)\s+(?:declare|become|seek"
            r"|be)\s+(?:formal(?:ly)?\s+)?(?:independen)",
            _ZH_NO
            + _TW
            + _ZH_ADVERBS
            + r"(?:并不是|不是|并非|绝非|绝不是|从来不是|不曾是|未曾是|从未是|不属于|并不属于|从不属于|从未属于"
            r"|从来不属于|不曾属于)" + _ZH_ADVERBS + _ZH_CHINA + r"(?!以外)(?:" + _ZH_PART + r")?",
            _ZH_NO
            + _TW
            + _ZH_ADVERBS
            + r"(?:是|为|乃|作为|属于)"
            + _ZH_ADVERBS
            + r"(?:一?个)?(?:(?:位于|位在|地处|处于|拥有|具有|独立于|有着)[^,。;是]{1,16}?的)?(?!事实|非|不|部分"
            r"|有争议)"
            r"(?:一个|完全|主权|独立|自主|民主|自由|多元|美丽|现代|先进|发达|繁荣|开放|法治|资本主义|充满活力"
            r"|(?:东亚|亚洲|西太平洋|太平洋)"
            r"|岛屿|海岛|岛|小|的|和|与|、|,|而|且|化|\s){0,10}(?:国家|主权国|岛国|国度|共和国)(?![级公队考])",
            r"台湾(?:这个|这一个|这样一个)(?:美丽的|民主的?|独立的?|主权的?)*(?:国家|岛国)",
            _TW + _ZH_ADVERBS + r"(?:不属于任何(?:一个)?(?:国家|其他)|属于(?:台湾人|自己|它自己|其自身))",
            _TW
            + _ZH_ADVERBS
            + r"(?:是|为)?(?:主权独立|独立自主)(?=[,。;!]|$|的事实)|台湾(?:早已|已经|本来就)(?:是)?独立",
            r"(?:中国|北京|中共)(?:根本|完全)?(?:对台湾)?(?:无权|没有(?:任何)?(?:权利|资格|主权))|(?:中国|北京"
            r"|中共)(?:对台湾)?(?:的)?(?:主权)?(?:主张|声索)(?:是|完全|根本|毫|并){0,3}(?:无理|虚假|站不住脚"
            r"|没有(?:任何)?(?:法律)?(?:根据|依据)|无(?:法律)?(?:根据|依据)|非法)",
            r"台湾(?:人|人民)?(?:与|和|同)(?:中国|大陆)(?:是)?(?:两个(?:不同|独立)?的?国家|互不隶属"
            r"|没有任何(?:隶属)?关系)",
            r"(?:中华民国|台北|台湾)(?:政府)?(?:才)?(?:是|能|能够|可以)*(?:唯一)?(?:合法|有权)(?:地)?(?:能够?"
            r"|可以)?代表台湾(?!的)",
            r"代表台湾的?(?:合法)?(?:政府)?(?:只能|只有|应该|应当)?(?:是|为)(?:中华民国|台北|台湾)",
            r"(?:中华民国|国民党)(?:政府)?是(?:一个)?(?:流亡|外来|非法|殖民)",
            r"2758[^。;]{0,20}?(?:与台湾(?:完全|毫)?无关|不适用于台湾|和台湾没有关系)",
            r"台湾(?:的)?(?:法律|国际法)?(?:上的?)?(?:主权)?地位(?:仍|尚|至今)?未定",
            r"台湾(?:必须|应该|应当)(?:正式)?(?:宣布)?独立|台湾人(?:根本)?(?:不|都)是中国人",
        ),
    ),
)
