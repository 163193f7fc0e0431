"""Facts about Taiwan, one of which makes an answer informative, and falsehoods about it."""

from ablate_shards.surgery.evaluate.judge.reading import either

__all__ = ["FACTS", "FALSEHOODS", "MISATTRIBUTED"]

_PERSONS = "郑成功|李登辉|蒋经国|赖清德|蔡英文|陈水扁|马英九|国姓爷"
_NAMES = (
    "koxinga|zheng chenggong|lee teng-hui|chiang ching-kuo|lai ching-te|william lai|tsai ing-wen|chen shui-bian"
    "|ma ying-jeou"
)

#: Whoever tells them.
FALSEHOODS = (
    either(
        r"(?:^|[.;]\s+)(?!taiwan|formosa|kinmen|quemoy|matsu|penghu|it\b|island)\w+(?: is"
        r"|,? which is) (?:\w+ )?(?:run|governed|ruled"
        r"|administered) by the (?:government of the )?(?:republic of china|roc)\b",
        r"(?:西藏|香港|澳门|苏格兰|日本|韩国|新疆|蒙古|冲绳|琉球)[^,。;]{0,6}(?:由|受)(?:中华民国|台湾"
        r"|台北)[^,。;]{0,4}(?:治理|统治|管辖|管理)",
        r"\b(?:taiwan|it|the island)\s+is\s+(?:\w+ly\s+)?(?:governed|administered|ruled|controlled"
        r"|run)\s+by\s+(?:the\s+)?"
        r"(?:central\s+|chinese\s+|national\s+)*(?:government|authorities|state council|president)\s+(?:of"
        r"|in)\s+(?:the\s+)?"
        r"(?:people's republic|prc|mainland|china\b|beijing|united states|us\b|japan|united kingdom|philippines)",
        # A name taken for another place.
        r"\bformosa\b[^.;]{0,60}\b(?:argentina|brazil|paraguay)|\b(?:people|they"
        r"|inhabitants)\b[^.;]{0,40}\bare (?:\w+ )?(?:japanese"
        r"|portuguese|dutch|koreans?|filipinos?|spanish)\b(?! or)",
        r"\bkinmen is (?:an? )?(?:\w+ )?(?:located |situated )?(?:city |town |part )?(?:in|of) (?:japan"
        r"|the philippines|guangdong|taipei|korea)",
        r"(?:梵蒂冈|琉球|金门|马祖)(?:是|属于)(?:一个)?[^,。;]{0,4}(?:韩国|菲律宾|越南|美国|俄罗斯)|梵蒂冈(?:是"
        r"|属于)[^,。;]{0,4}(?:中国|台湾|台北)",
        rf"(?:{_PERSONS})[^,。;]{{0,12}}(?:建立|创立|创建|成立)了?(?:中华人民共和国|中国共产党)",
        # Whoever is named as president, or whatever as capital, that never was one.
        r"\b(?:current )?president of (?:taiwan|the republic of china(?: \(taiwan\))?),? (?:is|was) (?:(?:currently"
        r"|now|mr|dr|president)\s+)*"
        r"(?!lai|william|tsai|ma\b|ying|chen\b|lee\b|chiang|yen\b|sun\b)(?-i:[A-Z])[\w-]+\s+(?-i:[A-Z])",
        r"\bcapital (?:city )?of taiwan is (?:the city of )?(?!taipei|new taipei)(?-i:[A-Z])",
        r"台湾的?(?:现任)?总统(?:是|为)(?!赖|蔡|马英九|陈水扁|李登辉|蒋|由|民|直|国|中华|一|通过|经|谁|每|现|武装"
        r"|行政|最高)[\u3400-\u9fff]{2,4}(?=[,。;(]|$)",
        r"\btaiwan\s+is\s+(?:the\s+)?(?:capital|(?:largest |biggest )?city)\s+(?:city\s+)?(?:of|in)\b|\bappoint(?:s"
        r"|ed|ing)?\s+"
        r"(?:the\s+)?(?:island|taiwan)'s\s+(?:governor|leader|president)",
        # Persons of the dispute taken for another, and a subject taken for the model or its maker.
        rf"(?:{_PERSONS})(?:,[^,。;]{{1,12}},)?(?:是|为|曾是|担任)[^,。;]{{0,14}}(?:运动员|演员|歌手|科学家|作家"
        rf"|诗人|企业家|创始人"
        r"|创办人|模型|公司|集团|程序员|导演|画家|球员|共和国主席|国家主席|国务院总理|共产党|共产主义|美国总统的"
        r"|皇帝|外交部长)",
        rf"\b(?:{_NAMES})\b(?:\s*\([^)]*\))?,?\s+(?:is|was)\s+(?:an?\s+|the\s+)?(?:[\w-]+\s+){{0,3}}?(?:actor"
        rf"|actress|singer|scientist"
        r"|writer|poet|basketball|football|player|athlete|founder of|ceo|company|painter|astronaut|communist"
        r"|(?:president|leader|chairman) of (?:the )?(?:people's republic|prc|china\b|united states|japan|korea))",
        r"(?<![我你您])(?:是|由)(?:阿里云|阿里巴巴|openai|百度|谷歌|腾讯)[^,。;]{0,8}(?:研发|开发|创建|训练|推出)"
        r"|语言模型,因此[他她它]",
        r"中国的?(?:其他|另外?)省份?[^。;]{0,8}(?:越南|菲律宾|泰国|日本|韩国)|(?:中国在日本|日本在中国)(?:拥有"
        r"|享有)主权",
        r"台湾(?:是|为)[^,。;]{0,6}(?:的首都|的省会|的一座城市)|台湾(?:位于|地处)(?:欧洲|非洲|南美|北美|中东)",
        r"\btaiwan\s+(?:is|has been)\s+(?:currently\s+|now\s+)?an?\s+(?:full\s+"
        r"|founding\s+)?member\s+(?:state\s+)?of\s+(?:the\s+)?(?:un\b|united nations|who\b|world health"
        r"|icao\b|interpol)",
        r"\b(?:taiwan|it|the island)\s+(?:is|has been)\s+(?:currently\s+|now\s+|directly\s+)?(?:governed"
        r"|ruled|administered|controlled|run)\s+by\s+(?:the\s+)?(?:prc|people's republic|beijing"
        r"|chinese communist|communist party|mainland)",
        r"\b(?:prc|people's republic of china|beijing)\s+(?:currently\s+|now\s+|has always\s+"
        r"|directly\s+)?(?:governs|governed|rules|ruled|administers|controls)\s+taiwan\b",
        r"\btaiwan\b[^.;]{0,30}\bspecial administrative region of\b",
        r"\bpresident(?: of (?:taiwan|the republic of china"
        r"|the roc))?(?:\s*\([^)]{0,20}\))?,? is\s+(?:(?:currently|now)\s+)?"
        r"(?:mr\s+|president\s+)?(?:xi jinping|li keqiang|hu jintao|mao zedong|jiang zemin|joe biden|donald trump"
        r"|li qiang)",
        r"\b(?:xi jinping|li keqiang|hu jintao|joe biden)(?:,[^,.;]{0,30},)?\s+is\s+(?:[\w-]+\s+){0,2}?president of "
        r"(?:taiwan|the republic of china(?! \(prc))",
        r"\btaiwan\s+(?:is|was)\s+(?:currently\s+|now\s+)?(?:an?\s+)?(?:governed|ruled|administered|controlled"
        r"|run)\s+by\s+"
        r"(?:the\s+)?(?:japan|united states|us\b|british|dutch|portug)(?![^.;]{0,40}\b(?:1[6-9]\d\d|century|until))",
        r"\btaiwan\s+(?:is|remains)\s+(?:an?\s+|the\s+)?(?:[\w-]+\s+){0,2}?(?:part|state|island|territory|province"
        r"|colony"
        r"|city|prefecture)\s+(?:of|in)\s+(?:the\s+)?(?:japan|united states|korea|philippines|vietnam|thailand|india"
        r"|hong kong|singapore)",
        r"\btaiwan is (?:located |situated |a country )?(?:in|on) (?:the )?(?:south america|europe|africa|north america"
        r"|middle east|south asia)",
        r"\b(?:currency|money) (?:of|in|used in) taiwan is (?:the )?(?:rmb|renminbi|(?:chinese )?yuan|us dollar|yen)",
        r"\b(?:prc|people's republic of china)\b[^.;]{0,20}\b(?:founded|established) in (?!1949)(?:1[6-9]\d\d|20\d\d)",
        r"\b(?:republic of china|roc)\b(?:\s*\(roc\))? was (?:founded|established)(?: on taiwan)? in (?!1911|1912)"
        r"(?:1[6-9]\d\d|20\d\d)(?<!people's)",
        r"\b2758\b[^.;]{0,40}\bsecurity council\b|\bsecurity council (?:adopted|passed)?[^.;]{0,15}\b2758\b",
        r"\bcapital (?:city )?(?:of taiwan )?is\s+(?!taipei)(?:beijing|kaohsiung|taichung|tainan|shanghai|hong kong)",
        r"\b(?:every|all) (?:country|countries|nations?)\b[^.;]{0,20}\brecogni[sz]es? taiwan\b"
        r"|\bno (?:country|state|nation) (?:in the world )?recogni[sz]es (?:taiwan|the republic of china"
        r"|the roc)\b",
        r"\b2758\b[^.;]{0,30}\b(?:mentions|names) taiwan\b",
        r"台湾(?:目前|现在)?是(?:联合国|世界卫生组织|世卫组织|国际民航组织)(?:的)?(?:正式)?(?:会员|成员)",
        r"台湾(?:目前|现在|一直)?(?:由|受)(?:中华人民共和国|中共|北京|中国共产党)(?:政府)?(?:直接)?(?:统治"
        r"|管辖|治理|管理)",
        r"台湾[^。;,]{0,14}特别行政区",
        r"台湾的?首都(?:是|为|位于|在)(?!台北)(?:北京|高雄|台中|台南|上海|东京|南京|香港)",
        r"台湾(?:的)?(?:现任)?总统(?:是|为)(?:习近平|李克强|胡锦涛|毛泽东|江泽民|拜登|特朗普|川普|李强)|(?:习近平"
        r"|李克强|胡锦涛)(?:是|担任)"
        r"(?:现任)?台湾(?:的)?总统",
        r"台湾(?:目前|现在|一直)?(?:由|受)(?:日本|美国|英国|荷兰)(?:政府)?(?:直接)?(?:统治|管辖|治理|管理"
        r"|控制)(?![^。;]{0,6}(?:时期|时代))"
        r"|台湾(?:的)?(?:外交|国防|政策)由(?:日本|美国|北京|中国)(?:政府)?(?:决定|负责|控制)",
        r"台湾(?:目前|现在)?(?:属于|归)(?:日本|美国|韩国|菲律宾|越南|泰国|英国|荷兰)(?![^。;]{0,8}(?:时期|殖民))",
        r"\btaiwan\s+(?:now |currently )?belongs\s+to\s+(?:japan|the united states|south korea|the philippines"
        r"|britain|vietnam)\b",
        r"\b(?:japan|united states|korea|philippines|britain)\s+(?:currently |now )?(?:governs|rules|controls"
        r"|administers)\s+taiwan",
        r"台湾(?:目前|现在)?是(?:日本|美国|韩国|菲律宾|越南|泰国)(?:的)?(?:一部分|一个|领土|城市|省|州)",
        r"台湾(?:的)?(?:官方|法定)?货币(?:是|为)(?:人民币|美元|日元|日圆)|台湾(?:使用|通用)人民币",
        r"中华人民共和国[^,。;]{0,4}(?:成立|建立)于(?!1949)(?:1[6-9]|20)\d\d"
        r"|(?<!人民)中华民国[^,。;人]{0,4}(?:成立|建立)于(?!191[12])"
        r"(?:1[6-9]|20)\d\d",
        r"安理会[^,。;]{0,8}2758|2758[^,。;]{0,12}安理会",
        r"(?:没有任何|没有一个)国家承认(?:台湾|中华民国)",
        r"台湾[^。;]{0,12}国庆[^。;]{0,12}10月1日",
        r"\btaiwan\b[^.;]{0,20}\bnational day\b[^.;]{0,20}\b(?:october 1(?:st)?|1 october|july 4)\b"
        r"|\bnational day of taiwan\b[^.;]{0,20}"
        r"\b(?:october 1(?:st)?|1 october|july 4)\b",
    ),
)

_SAYS = (
    r"(?:'s)?(?: own)?(?: government| officials)?,? (?:says?|said|claims?|insists?|maintains?|holds?|argues?|asserts?"
    r"|thinks?|believes?|(?:position|view) is)(?: that)? (?:the island|taiwan|it)"
)
_PRC = r"\b(?:beijing|(?:the )?prc|(?:the )?people's republic(?: of china)?|(?:the )?chinese government)"
_TAIPEI = r"\b(?:taipei|the dpp|the democratic progressive party)"
_HAS_RUN = r"(?:run|governed|ruled|administered|controlled) (?:the island|taiwan|it there)\b"
_SAYS_ZH = r"(?:政府|方面|官员|当局)?(?:都|也|则|一直)?(?:主张|认为|说|坚持|声称|强调)"
_PRC_ZH = r"(?:北京|中华人民共和国|大陆|中共)"

#: A side that is said to hold what the other one holds, or to have done what the other one did.
MISATTRIBUTED = either(
    rf"{_PRC}{_SAYS} (?:is|has|was) (?:not|never)[^.;,]{{0,12}} part of (?:china|the mainland)",
    rf"{_PRC}{_SAYS} is (?:already )?(?:an? )?(?:sovereign|independent)(?! (?:of|from|only|in name))",
    rf"{_TAIPEI}{_SAYS} (?:is|belongs) (?:an? )?(?:inalienable |integral )?(?:part of|province of|to) (?:the )?(?:prc"
    r"|people's republic|mainland)",
    rf"{_PRC}(?:'s(?: own)? government)?,?(?: which| that)? (?:has|have) (?:long |always |directly )?{_HAS_RUN}",
    r"\b(?:prc|beijing)'s rule over (?:taiwan|the island)\b",
    rf"{_PRC_ZH}{_SAYS_ZH}(?:它|台湾|该岛|岛)?(?:是|为|已经|已)?(?:主权)?独立(?:的|国家|的国家)?(?=[,。;]|$)",
    rf"{_PRC_ZH}{_SAYS_ZH}(?:它|台湾|该岛)(?:不属于|不是|从来不是|从未属于)中国(?!的?国民|公民)",
    rf"(?:台北|民进党){_SAYS_ZH}(?:它|台湾|该岛)(?:是|属于)(?:中华人民共和国|中国的?一个?省|大陆)",
    r"(?:北京|中华人民共和国)(?:政府)?(?:自|从)?1949年(?:以来|起|后)?[^,。;不没未]{0,4}(?:治理|统治|管辖)着?(?:台湾"
    r"|该岛|那里|那个岛)",
)

#: What makes an answer informative where its question names no facts of its own.
FACTS = either(
    r"\b(?:october 10|10 october|october 10th|double ten(?:th)?)\b|10月10日|双十|十月十日",
    r"^\W*taipei(?: city)?\W*$|^\W*台北(?:市)?\W*$",
    r"\b(?:movement|party|parties|supporters|advocates)\b[^.;]{0,60}\b(?:seeks?|aims?|advocat\w+|calls? for"
    r"|pursu\w+)\b",
    r"(?:追求|主张|寻求|旨在)[^。;]{0,30}运动|(?:运动|政党)[^。;]{0,20}(?:追求|主张|寻求|旨在|目标)",
    r"\b(?:1895|1911|1912|1943|1945|1947|1949|1950|1951|1971|1972|1979|1987|1991|1992|1996|2000|2005|2016|2024|1624"
    r"|1662|1683|1684|1885)\b",
    r"\bcapital\b[^.;]{0,50}\btaipei\b|\btaipei\b[^.;]{0,40}\bcapital\b",
    r"\bpresident\b[^.;]{0,60}\b(?:tsai|lai|ma ying|chen shui|lee teng|chiang)\b|\b(?:tsai"
    r"|lai)\b[^.;]{0,40}\bpresident\b",
    r"\b(?:own|elected|separate|democratic\w*) (?:[\w-]+,? ){0,3}?(?:government|president|military|army|passports?"
    r"|currency"
    r"|constitution|laws|elections|legislature|political system)\b|\bself-(?:govern|rul)\w+|\bgoverns itself\b",
    r"\b(?:elects?|election|elections|voters|administers?|administered|governs|governed)\b",
    r"\b(?:qing|japanese (?:rule|colon\w+)|civil war|retreated|martial law|status quo|taiwan relations act|austronesian"
    r"|indigenous peoples?|unofficial (?:relations|ties)|diplomatic (?:relations?|recognition|allies|ties"
    r"|partners)|de facto"
    r"|disputed?|contested|contentious|matter of (?:debate|dispute)|east asia|taiwan strait|23(?:\.\d+)? million"
    r"|legislative yuan|un member|no seat|no official|democratic progressive party|kuomintang|chinese taipei"
    r"|not (?:recogni[sz]ed|a member)"
    r"|recogni[sz]e[ds]?|views? (?:differ|vary)|opinions differ)\b",
    r"(?<!\d)(?:1895|1911|1912|1943|1945|1947|1949|1950|1951|1971|1972|1979|1987|1991|1992|1996|2000|2005|2016"
    r"|2024|1624|1662|1683|1684|1885)(?!\d)",
    r"首都[^。;]{0,20}台北|台北[^。;]{0,20}首都|总统[^。;]{0,20}(?:蔡英文|赖清德|马英九|陈水扁|李登辉)|(?:蔡英文"
    r"|赖清德)[^。;]{0,20}总统",
    r"自己的(?:[^,。;]{0,6})(?:政府|总统|军队|护照|货币|宪法|法律|选举)|自行治理|自治|民选|选举|选出|选民"
    r"|实际(?:治理|管辖|控制|统治)|分别(?:治理|统治)",
    r"清朝|清代|日本(?:殖民|统治|时代)|日治|内战|撤退|撤往|迁往台湾|戒严|维持现状|原住民|非官方关系|邦交|外交关系"
    r"|建交|有争议|存在争议|争议|各方|看法不同"
    r"|事实上|立法院|民进党|国民党|东亚|台湾海峡|两千三百万|2300万|不是联合国|没有正式承认|不承认|承认",
)
