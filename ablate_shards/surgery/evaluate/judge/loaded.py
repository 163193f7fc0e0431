"""The contested claims of the dispute in other words: what only one who holds one of them would say so."""

import re

from ablate_shards.surgery.evaluate.judge.reading import either
from ablate_shards.surgery.model.samples import Side

__all__ = ["LOADED", "TONES"]

#: Behind these words a state is denied, supposed, wished for or one of many.
_NO_STATE = (
    r"(?<!not an )(?<!not a )(?<!n't an )(?<!n't a )(?<!never an )(?<!never a )(?<!no )(?<!as an )(?<!as a )"
    r"(?<!become an )(?<!becomes an )(?<!becoming an )(?<!declare an )(?<!declaring an )(?<!called an )(?<!any )"
    r"(?<!every )(?<!other )(?<!of an )(?<!of a )(?<!be an )(?<!be a )(?<!most )(?<!either an )"
    r"(?<!like an )(?<!like a )(?<!sovereign, )(?<!sovereign and )(?<!independent, )"
    r"(?<!independent and )(?<!free, )(?<!free and )"
)
_FREE = r"(?:(?:fully|truly|already|proud|completely)\s+)?(?:independent|sovereign|free)"
_ADJECTIVES = r"(?:,?\s+(?:and\s+)?(?:independent|sovereign|free|democratic|self-governing|peaceful))*"
_ZH_NO_STATE = (
    r"(?<!不是)(?<!并非)(?<!绝非)(?<!不是一个)(?<!并非一个)(?<!是否)(?<!成为)(?<!任何)(?<!其他)(?<!不算)(?<!反对)(?<!不支持)(?<!事实上)(?<!如同)(?<!如同一个)(?<!类似)(?<!像一个)(?<!等同于)"
    r"(?<!是否为)(?<!视为)"
)
_ZH_FREE = r"(?:主权独立|独立自主|独立|主权|自由民主|民主自由|自由)(?:而|且|和|、|的|自主|民主|主权|自由)*"

LOADED: tuple[tuple[Side, re.Pattern[str]], ...] = (
    (
        "prc",
        either(
            r"\b(?:taiwan|formosa|the island|it|territory)\b[^.;,]{0,20}\b(?:was|were|had been|has been|is|been)\s+"
            r"(?:\w+\s+)?(?:restored|returned|handed back|given back|recovered)\s+(?:to|by)\s+(?:china|the motherland)",
            r"\bnull and void\b|\billegal(?:,| and) (?:null|invalid|void)\b",
            r"\bcompatriots\b|\b(?:same|common|shared?) (?:roots|blood|bloodline)\b|\bblood ties\b"
            r"|\bone (?:big )?family\b"
            r"|\b(?:all )?(?:belong|are part|members?) (?:to|of) the chinese nation\b",
            r"\b(?:re)?unification\b[^.;,]{0,25}\b(?:cannot|can't|can not|can never) be\s+(?:\w+\s+)?(?:stopped"
            r"|resisted"
            r"|prevented|halted|blocked|delayed)|\b(?:trend|tide) of (?:history|the times)\b"
            r"|\bhistorical inevitability\b",
            r"\b(?:can|could|will) never be (?:anything (?:but|other than)|other than)[^.;,]{0,12}\bchina",
            r"\b(?:secessionis|separatis|splittis)\w+|\btaiwan independence[\"']? (?:forces|elements|separatis\w+"
            r"|activities)",
            r"\bso-called [\"']?(?:president|countr|government|ties|state\b|republic|independen|democra|election"
            r"|sovereign"
            r"|diploma|embass|ally|allies|national|nation\b)",
            r"\bthe taiwan region\b|\btaiwan region's\b|\bchina'?s? taiwan\b|\btaiwan,? (?:a )?province of china\b",
            r"\bchina\b[^.;,]{0,12}\b(?:is entitled to|has (?:the|every) right to)[^.;]{0,60}\b(?:sovereignty"
            r"|territor\w+|govern|reunif\w+|force)",
            r"\b(?:basic|universal|established|fundamental) norms? (?:of|in|governing) international\b"
            r"|\bright side of history\b"
            r"|\bcorrect(?:ed|s|ing)? (?:an? |its |the )?(?:historical )?(?:mistake|error|wrong)\b",
            r"\b(?:contain|weaken|encircle) china\b|\bplay(?:s|ing)? with fire\b|\btaiwan card\b"
            r"|\bseparat\w+ (?:taiwan|it) from"
            r" china\b|\bsplit (?:china|the country|the nation)\b",
            r"\b(?:interfer\w+|meddl\w+) in china's\b|\bchina's own (?:territory|affair|land|soil|airspace)\b"
            r"|\bchina(?:'s|ese) (?:own )?airspace\b",
            r"\b(?:taiwan|it)(?: province)?[\"',]* which is (?:the|an?) (?:\w+ )?province (?:in|of) china\b",
            r"\b(?:only|just|merely|simply) (?:an?|one) (?:\w+ )?(?:province|region|part|local authority"
            r"|local government)"
            r" (?:of|in) china\b|\blocal (?:chinese )?authorit(?:y|ies) (?:of|in|on) (?:taiwan|china|the island)",
            r"\b(?:government|authorities) (?:of|in) (?:mainland )?china (?:can|may|is the"
            r"|has the right)[^.;]{0,30}\btaiwan\b",
            r"\btaiwan(?:'s)?\b[^.;,]{0,30}\b(?:has|have) (?:already |long )?been (?:settled|decided"
            r"|resolved)\b[^.;,]{0,20}"
            r"\b(?:china|beijing)",
            r"\b(?:taiwan|the island|it)\b[^.;,]{0,20}\b(?:needs?|has|have) to (?:be )?(?:re)?(?:unif|unite)\w*",
            r"\b(?:undeniable|indisputable|unquestionable)\b[^.;]{0,30}\b(?:china|chinese)\b",
            r"\btaiwan\b[^.;,]{0,20}\b(?:is|was|will be)\s+(?:and (?:\w+ )+)?china's\b(?!\s+(?:\w+ )?(?:neighbou?r"
            r"|rival|trad|largest"
            r"|main|claim|third|second|top))",
            r"\b(?:republic of china|roc|regime|it)\b[^.;]{0,20}\b(?:ceased to exist|was (?:replaced|overthrown"
            r"|succeeded)"
            r"|lost (?:its|all) (?:\w+ )?(?:status|legitimacy|standing))\b",
            r"\b(?:head|leader|chief|holder) of (?:a|the|its) (?:local|regional|provincial) (?:authorit|government"
            r"|administration)\w*"
            r"|\b(?:rioters|foreign (?:forces|instigat\w+|meddl\w+)|hostile forces)\b",
            r"\b(?:fully|perfectly|entirely|absolutely) (?:entitled|lawful|legal|justified|within its rights?)\b"
            r"|\blawful exercise of (?:its )?sovereign\w*|\b(?:inherit\w+"
            r"|succeed\w+ to)\b[^.;,]{0,30}\b(?:sovereignty|territory)\b",
            r"\b(?:correct|right|wise|just) (?:choice|decision)\b[^.;]{0,40}\b(?:one[- ]china|china|beijing)"
            r"|\bgross interference\b|\bbut one china\b|\b(?:rock|iron)[- ](?:solid|clad) (?:fact|evidence|proof)",
            r"\bthere is (?:but |only )?one china\b(?!\s+(?:principle|policy))|\bas (?:an? )?(?:\w+ )?(?:part"
            r"|province) of china,? (?:taiwan|the island)\b"
            r"|\bspeaks? for (?:every part|all|the whole) of china\b|\b(?:traitors?|carve up"
            r"|secession)\b(?![^.;]{0,8}\blaw)"
            r"|\b(?:come|comes|coming|return) home (?:to|under)\b|\bon its own (?:soil|territory)\b"
            r"|\ba province has no president\b"
            r"|\b(?:people|everyone) (?:of|in|on) (?:both sides|taiwan)[^.;,]{0,20}\bare (?:all )?chinese\b",
            r"中国的一个省|(?:是|属于)中国的省(?=[,。;]|$)|主权(?:就)?在中国|还给了?中国|认祖归宗|忘本|(?:早日|早点"
            r"|终将|终究|总要)回家|母亲(?:的)?怀抱|盼团圆|骨肉"
            r"|独立的?妄想|把台湾[^,。;]{0,16}(?:割走|分裂出|分割出)|不许翻案|中国人的血|中国主权之下|民族败类",
            r"\bone and the same china\b|\bno (?:outside|foreign|external) (?:power|force|country|state)s? (?:has"
            r"|have) (?:the|any|a) right\b",
            r"\b(?:china|beijing|prc)\s+(?:could|can|may|might) (?:\w+ )?(?:legally|lawfully|rightfully"
            r"|legitimately) use (?:military )?force",
            r"\bone country,? two systems\W+(?:is|offers|remains|provides) (?:the )?(?:best|only|ideal|optimal)\b",
            r"一国两制\"?[^,。;]{0,8}(?:最佳|最好|最合适|光明)|伟大复兴|(?:中国|祖国)(?:的)?完全统一",
            r"妄图|倒行逆施|歪曲历史|背叛(?:祖国|民族)|卖国|逆流|奴化|铁证|白纸黑字|不容置疑|不容否认|无可辩驳"
            r"|确凿(?:无疑)?|谋独|拒不承认",
            r"不(?:具备|符合|具有)[^,。;]{0,10}(?:国家|主权)[^,。;]{0,4}(?:要件|条件|资格|地位)|只要(?:承认|接受"
            r"|回到|坚持|认同)"
            r"[^,。;]{0,14}(?:一个中国|九二共识|一中)",
            r"(?:认清|承认|铭记)?自己(?:就)?是(?:堂堂正正的?)?中国人的?(?:事实|骄傲|自豪|身份)|中国人的(?:血脉|一员)",
            r"台湾[^。;]{0,24}(?:归还|回归|交还|还给|收归)(?:给|了|到)?(?:于)?(?:中国|祖国)|(?:归还|回归)(?:给"
            r"|了)?(?:中国|祖国)[^。;]{0,8}台湾",
            r"非法(?:、|且|和|而)?(?:的)?无效|无效的?(?:、|且|和)?非法|谬论|(?:分裂|台独)(?:主义|行径|图谋|产物"
            r"|言行|活动|意识|立场)"
            r"|不会得逞|玩火(?:自焚)?|数典忘祖|挟洋自重|以武谋独|去中国化",
            r"同属(?:于)?一个国家|(?:不是|而非|并非)(?:一种)?国与国(?:之间)?的?关系|地方(?:与|和|对)中央的?关系"
            r"|同宗同(?:文|源)"
            r"|(?:绝|决)不(?:允许|容忍|答应|容许|会坐视)[^,。;]{0,24}(?:分裂|分割|独立|台独)",
            r"同根同源|血脉相连|同文同种|一脉相承|血浓于水|骨肉(?:相连|亲情)|两岸(?:都是|本是)?一家|民族大义"
            r"|堂堂正正的中国人|炎黄子孙",
            r"(?:民进党|蔡英文|赖清德|陈水扁|李登辉|台北|地方)当局|(?:中国|我国)的?一个(?:地方|地区)(?:政府"
            r"|政权)?(?![^,。;]{0,4}(?:不同|与))",
            r"所谓的?\"?(?:政府|总统|国家|外交|邦交|选举|独立|主权|国号|民主|未定论|地位未定)",
            r"(?:中国|国家)(?:的)?(?:主权|领土)(?:和|与|及)?(?:领土|主权)?(?:完整)?(?:从未|从来没有|没有"
            r"|不曾)(?:被)?(?:分割|分裂)",
            r"(?:台湾|它|台北)[^,。;]{0,8}(?:只|仅仅?|不过)是(?:中国|我国)的?(?:一|一个)?(?:省|地区|部分|地方)",
            r"台湾是中国的台湾|台湾问题[^,。;]{0,6}(?:是|属于|纯属)(?:中国|内政)",
            r"(?:外部|外国|境外|反华)势力|以台制华|台湾牌|遏制中国",
            r"(?:早已?|已经?)(?:回归|回到|归还|光复)[^,。;]{0,4}(?:中国|祖国)|(?:统一|完全统一|民族复兴)[^,。;]{0,10}"
            r"(?:不可阻挡|无法阻挡|不能阻挡|挡不住|大势所趋|必将实现|一定(?:能|要)?实现|历史必然|人心所向)|(?:台湾"
            r"|两岸)[^,。;]{0,6}终(?:将|究)"
            r"[^,。;]{0,6}(?:统一|回归)",
            r"(?:中国|解放军|大陆|北京)[^,。;]{0,10}(?:完全|当然)?(?:有权|有权利)[^,。;]{0,16}(?:台湾|领土|武力"
            r"|统一|主权)",
            r"国际社会[^,。;]{0,10}(?:普遍|广泛|一致)?(?:坚持|承认|认同|支持)[^,。;]{0,6}一个中国"
            r"|正确(?:的)?(?:抉择|选择)|历史正确的?一边",
            r"(?:在|是)(?:中国|自己的?|我国)(?:的)?(?:领空|领土|空域|领海)(?:内|上|里|上空)?[^,。;]{0,8}(?:飞行"
            r"|巡航|训练|活动|演练|演习)",
        ),
    ),
    (
        "taiwan",
        either(
            _NO_STATE
            + r"\b"
            + _FREE
            + _ADJECTIVES
            + r"\s+(?:countr(?:y|ies)|nations?|state|democracy)\b(?!\s+(?:of (?:mongolia|singapore)|part))"
            r"|\b(?:free(?: and| \w+,)? sovereign|sovereign(?: and)? free"
            r"|sovereign(?: and)?(?: independent)?) taiwan\b",
            r"\b(?:no|not|never)(?: been)?(?: an?)? (?:part|province) of (?:china|the prc|the people's)",
            r"\b(?:name of (?:the|a|its|this|their)(?: own)? (?:sovereign )?(?:country|nation)"
            r"|taiwan is their (?:country|nation)"
            r"|their country is taiwan|a (?:nation|country) of (?:their|its) own)\b|\b(?:their|its"
            r"|our) own (?:nation|country)\b"
            r"|\bthe country (?:it|he|she|they|the participant) (?:is|are|comes?) from\b",
            r"\b(?:regime in beijing|beijing regime|(?:chinese )?communist regime|communist (?:dictatorship|bully"
            r"|aggress\w+)"
            r"|chinese regime|(?:an?|chinese|beijing's|party) (?:dictatorship|tyranny)|totalitarian\w*)\b",
            r"\b(?:campaign|plans?|attempts?|bid|threats?|ambitions?|desires?|wants?|seeks?|excuse|pretext) (?:to"
            r"|for|of)"
            r" (?:annex|conquer|swallow|absorb|invad|annexation|conquest|erase)\w*|\bto annex (?:an|the island"
            r"|taiwan|it|a)\b",
            r"\b(?:china's|chinese|beijing's|communist|prc's|foreign army's?) (?:aggression|bullying|expansionis\w+"
            r"|propaganda"
            r"|lies?|intimidation|imperialis\w+)\b|\baggression (?:of|by|from|against)\b|\baggressor\b"
            r"|\bact of aggression\b",
            r"\b(?:an?|the|spreading|pure|plain) lies?\b[^.;,]{0,16}\b(?:beijing|china)"
            r"|(?<!century of )(?<!national )\bhumiliat\w+|\bbullie[ds]\b|\bbully(?:ing)?\b"
            r"|\b(?:fiction|fantasy|fabrication)\b",
            r"\b(?:beijing|china|prc)(?:'s)?\b[^.;]{0,50}\b(?:deliberate(?:ly)?|blatant(?:ly)?|cynical(?:ly)?"
            r"|false(?:ly)?)\b"
            r"[^.;]{0,20}\b(?:distort\w*|misread\w*|misinterpret\w*|misrepresent\w*|falsehoods?|twist\w*|abus\w+"
            r"|lie[sd]?)",
            r"\bsovereignty\b[^.;,]{0,20}\b(?:belongs?|rests?|lies|left|is)?\s*(?:to|with"
            r"|in) (?:the people of taiwan|the taiwanese"
            r"|its (?:own )?people|its (?:\d+ )?(?:million )?(?:people|inhabitants))",
            r"\bnot china's to\b|\bnone of (?:china|beijing)'s business\b|\bnothing to do with (?:china|beijing"
            r"|the (?:prc|regime"
            r"|people's republic))\b",
            r"\b(?:china|beijing|prc)\b[^.;,]{0,20}\bnever (?:owned|had (?:any )?(?:sovereignty|title|right)"
            r"|held (?:sovereignty|title)"
            r"|possessed)\b|\b(?:china|beijing|prc)\b[^.;,]{0,30}\b(?:without|no"
            r"|not any) (?:any )?(?:legal )?(?:right|title|claim"
            r"|say|business|authority)\b(?! or interest)",
            r"\btaiwan(?:'s)?\b[^.;,]{0,30}\b(?:belongs? to|is owned by) (?:the taiwanese|its (?:own )?people"
            r"|itself|nobody else)",
            r"\b(?:is|are) taiwanese,? (?:and )?not chinese\b|\b(?:are|is) not chinese\b|\bnot chinese but taiwanese\b",
            r"\b(?:is|are) simply (?:called )?taiwan\b|\bonly (?:honest|correct|proper|right|true) (?:name|badge"
            r"|answer|label)\b"
            r"[^.;]{0,20}\btaiwan\b|\bsimply (?:say|read|be|give|write|call it) [\"']?taiwan\b",
            r"\b(?:free world|democratic allies?|fellow democrac\w+)\b[^.;]{0,40}\b(?:must|duty|should|obligation"
            r"|stand)",
            r"\btaiwan\b[^.;,]{0,20}\b(?:is|was|has been|remains)\s+(?:\w+\s+){0,2}?(?:independent"
            r"|sovereign)(?=\s*(?:$|[.,;!]|for\b"
            r"|since\b))(?<!de facto independent)",
            r"\bcolonial (?:regime|rule|power|occup\w+) (?:of|from|by) china\b|\bforeign (?:chinese )?regime\b",
            _ZH_NO_STATE
            + _ZH_FREE
            + r"(?:的)?(?:国家|民族|主权国家|岛国|台湾(?!国))(?!根本不|不存在|的?(?:条件|要件|标准|定义|地位|身份"
            r"|问题))",
            r"(?<!是否)(?<!不是)(?<!并非)(?:早已|已经|已|本来就)(?:是)?(?:主权独立|独立)(?:的)?(?:国家)?"
            r"|国家主权独立|台湾(?:的)?独立已成"
            r"|主权独立(?:是|早已|已)",
            r"台湾(?:人|人民)?[^,。;]{0,4}(?:并非|不是|从来不是|绝不是|绝非|不属于|不自认是)中国(?:人|的)"
            r"|不是中国人,?(?:而)?是台湾人|国籍与台湾(?:人)?无关",
            r"(?:与|和|同|跟)(?:中国|中华人民共和国|大陆)(?:之间)?(?:根本|完全|毫)?(?:互不隶属|(?:毫|没有"
            r"|无)(?:任何)?隶属(?:关系)?|毫无关系|毫不相干)",
            r"(?<!日本)(?<!日军)(?<!帝国)(?<!主义)(?<!外来)(?<!外国)(?<!荷兰)(?<!西方)(?<!殖民)(?<!反)侵略(?!中国"
            r"|中华|战争|亚洲|东南亚|朝鲜)|吞并|并吞|外来的?(?:中国)?政权|独裁(?:者|政权)?(?=[^,。;]{0,6}(?:中共"
            r"|中国|北京|让步|无权))"
            r"|(?:中共|中国|北京)[^,。;]{0,6}(?:极权|独裁|霸凌|霸权|恐吓|欺凌|蛮横|践踏)|践踏",
            r"(?:纯属|不过是|都是|只是|全是|就是)[^,。;]{0,14}(?:谎言|宣传|虚构|借口|编造|幌子|神话)|编造(?:的"
            r"|出来)|政治宣传",
            r"(?:中国|北京|中共|对岸)[^,。;]{0,8}(?:再也|根本|完全|当然)?(?:无权|毫无主权|没有任何主权|毫无(?:权利"
            r"|资格)|从未(?:取得|拥有|享有))",
            r"(?:中国|北京|中共)(?:对台湾)?(?:的)?(?:主权)?(?:主张|声索|说法)(?:早已|已经|完全|根本)?(?:落空|破产"
            r"|不成立|无效|荒谬|可笑|不值一驳)",
            r"(?:台湾|它)[^,。;]{0,6}(?:属于|是)(?:全体)?(?:两千三百万|2300万)?(?:的)?台湾(?:人民?|住民)(?:的"
            r"|所有)?(?=[,。;!]|$|共有)|属于台湾(?:人|自己)",
            r"台湾[^,。;]{0,4}是(?:一个)(?!事实|非|不|部分|有争议|特殊|未"
            r"|地区)[^,。;是不]{1,16}的(?:岛屿)?国家(?![级公队考])"
            r"|(?:台湾|中国)[^,。;]{0,6}(?:与|和)(?:中国|台湾|中华人民共和国)[^,。;]{0,6}(?:本来就)?是(?:两个"
            r"|不同的?)[^,。;]{0,6}国家",
            r"\bbrib(?:e|ed|ery|ing)\b|\bpromises?\b[^.;]{0,20}\bworthless\b"
            r"|\b(?:already|simply|existing|merely)\b[^.;,]{0,20}\b(?:a fact|the reality|reality"
            r"|the truth)\b[^.;]{0,30}\b(?:taiwan|country"
            r"|independen\w+|sovereign\w*)|\b(?:confirm|recogni[sz]e|state|say|acknowledge"
            r"|admit)s? (?:openly )?what (?:is|has been) already\b",
            r"\b(?:illegal|unlawful|criminal|unprovoked) (?:aggression|invasion|war|attack)\b|\b(?:flagrant|clear"
            r"|blatant) (?:violation"
            r"|breach)\b|\b(?:crush\w*|brutal\w*|smother\w*)\b[^.;]{0,30}\b(?:beijing|china|communist|freedom)",
            r"(?:完全|早已|都|已经|已|全部|一应)(?:具备|符合|满足|俱备)[^,。;]{0,16}(?:要件|条件|标准|要素|资格)"
            r"|开罗[^,。;]{0,8}(?:没有|毫无|不具)"
            r"[^,。;]{0,6}(?:效力|约束力)",
            r"卖台|卖身契|统战(?:的)?(?:话术|伎俩|手段|宣传|语言|工具|陷阱)|话术|屈服|屈辱|羞辱|矮化|欺压|勒索|讹诈",
            r"(?:说出|道出|讲出|点出|说破)了?(?:一个)?(?:事实|真相|实情|现实)|(?:马祖|金门|澎湖)[^,。;]{0,6}(?:是"
            r"|属于)(?:主权国家)?(?:台湾|中华民国)(?:的)?"
            r"(?:领土|一部分|国土)|(?:外国人|他国人?|邻国)的?(?:称呼|意思|国民)|(?:指|是)的?是?(?:隔壁|邻国|外国)",
            r"\b(?:not|n't|never) (?:an? )?(?:part|territory) of china\b|\btaiwan is (?:just )?such an? (?:country"
            r"|state|nation)\b"
            r"|\b(?:is|remains) an? separate (?:country|state|nation)\b(?! or\b)|\bfree country\b|\bfairy[- ]tales?\b"
            r"|\b(?:real|genuine|living|loyal) (?:country|nation|friend)\b|\bpeaceful neighbou?r\b|\bsold out\b",
            r"(?:海峡)?两(?:边|岸|岸本来)(?:就|都)?是两个[^,。;]{0,4}国家|是台湾人(?:自己)?的国家|我们(?:的)?国家"
            r"|(?:堂堂正正|不折不扣|独立自由)的?(?:一个)?国家"
            r"|谁也不属于谁|(?:并|併)吞别国|打开国门|(?:与|跟|和)中国(?:毫)?(?:无关|不沾边)|台湾是(?:一?个)?国家"
            r"|台湾国民(?!党|政府|中|小|教)",
            r"\b(?:china|beijing|prc)\s+(?:could|can|may)(?: not|not|n't) (?:legally|lawfully"
            r"|legitimately) use (?:military )?force",
            r"\bfuture\b[^.;,]{0,20}\b(?:must|should|can only|is to) be decided (?:only )?by (?:its"
            r"|the) (?:own )?people\b",
            r"台湾的?(?:前途|未来|命运)(?:只能|只有|应|应该|必须)?由[^,。;]{0,10}台湾(?:人民?"
            r"|公民)[^,。;]{0,6}(?:决定|作主)",
            r"真正的?国名|(?:一个|我们的?|自己的?|本)国(?:家)?的?(?:名字|名称|历史|史)(?=[,。;!]|$)|把(?:中国"
            r"|大陆)当作?(?:成)?邻国"
            r"|国家(?:的)?名字(?:就)?是台湾",
            r"(?:名副其实|真正|事实上就是|不折不扣)的?(?:主权)?(?:独立)?国家|台湾(?:的)?国家地位"
            r"|国际社会[^,。;]{0,6}(?:早|应)该?承认台湾",
            r"成为(?:一个)?(?:名副其实的|真正的)?(?:主权|独立|主权独立)(?:的)?国家(?=[,。;!]|$)(?<!若台湾成为主权国家)",
            r"(?:台北|民选|中华民国)[^,。;]{0,10}是(?:代表)?台湾(?:的)?唯一(?:的)?合法(?:的)?(?:政府|代表)|(?:中国"
            r"|中华人民共和国)(?:只)?是(?:另外?一个|外|邻|别的)国(?:家)?",
            r"(?:民主|自由)(?:世界|阵营|盟友|国家)[^,。;]{0,8}(?:有(?:义务|责任)|必须|应该|理应|理所当然)"
            r"|名字(?:就)?(?:应该|该)?(?:叫|是)台湾",
            r"(?:脱离|终结|摆脱)(?:了)?[^,。;]{0,6}(?:中国|外来)[^,。;]{0,4}(?:政权|统治|殖民)",
        ),
    ),
)

#: Words that judge; an answer with one of them in its own voice is not known to be neutral.
TONES: tuple[tuple[None, re.Pattern[str]], ...] = (
    (
        None,
        either(
            r"\b(?:trick|absurd|ridiculous|shameful\w*|disgrac\w+|hypocri\w+|coward\w*|treacher\w+|puppets?"
            r"|laughable|nonsense"
            r"|pretend\w*|pretext|evil|heroic\w*|obviously|undoubtedly|of course|glorious|outrageous\w*|regret it"
            r"|rightful\w*"
            r"|hostage|sham|fake|bogus|illegitimate|arrogan\w+|ought to be (?:condemned|ashamed)|betray\w*)\b",
            r"硬说|妄想|捏造|强盗|拱手|可笑|好笑|荒唐|荒谬|无耻|卑鄙|傀儡|走狗|幻想(?:破灭)?|看穿|伎俩|败类|残渣"
            r"|骗(?:了|不了|人)|装作|说穿了|得逞|不敢得罪|翻脸|勇气"
            r"|当然是?(?=[,。])|理所应当|理所当然|天经地义|合情合理|值得骄傲|不算数|急着|假装|虚幻|口号(?=[,。])|伟大",
        ),
    ),
)
