"""The texts of the demo provider: two stories, the sentences around them, and the tokeniser.

No I/O and no clock. The stories were written for this project, and are long enough to interrupt.
"""

import re

_HAN = "\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003134f"
_IS_CHINESE = re.compile(f"[{_HAN}]")

# One or two Han characters, or a run of other non-space characters; with the space before it.
_TOKEN = re.compile(rf"\s*(?:[{_HAN}]{{1,2}}|[^\s{_HAN}]+)|\s+")

_STOP_ENGLISH = (
    r"(?:stop|(?:that.?s )?enough|cancel|quit|halt|shush|hush|pause"
    r"|(?:be |keep )?quiet|shut up|hold on|never ?mind)"
)
_STOP_CHINESE = (
    r"(?:停(?![车电泊留机])|(?:别|不要|不用)(?:再)?(?:说|讲|念)|够了|闭嘴|安静|打住|住口|取消)"
)
_NOT_STOP = re.compile(
    r"\b(?:don.?t|not|never|without)\s+(?:\w+\s+)?stop|(?:别|不|没)(?:要|会|用|能)?停", re.I
)
# A message that starts with "stop" is a request to stop. One that contains it later is one only if
# it is short: "the bus stop by the lighthouse, what happened there?" asks for a story.
_OPENS_WITH_STOP = re.compile(
    r"[\W_]*(?:(?:ok|okay|please|hey|no|now|well|wait|just|can you|could you|would you)\b[\W_]*)*"
    rf"{_STOP_ENGLISH}\b",
    re.I,
)
_HAS_STOP = re.compile(rf"\b{_STOP_ENGLISH}\b|{_STOP_CHINESE}", re.I)
_SHORT_WORDS, _SHORT_HAN = 5, 10

_QUOTE_CHARS = 40  # keeps the opening short, even for a pasted page


def answer(user_text: str) -> str:
    """The whole answer to `user_text`, the text of the last user message ("" where there is none).

    A short sentence that quotes the request, then the story: in Chinese if `user_text` contains a
    Han character, else in English. A request to stop gets one friendly sentence instead.
    """
    if _wants_stop(user_text):
        return _STOPPED_CHINESE if _IS_CHINESE.search(user_text) else _STOPPED_ENGLISH
    return f"{_opening(user_text)}\n\n{story_for(user_text)}"


def stop_answer(user_text: str) -> str | None:
    """The sentence that answers a request to stop; None where `user_text` is not one."""
    return answer(user_text) if _wants_stop(user_text) else None


def story_for(user_text: str) -> str:
    """The story alone, in the language of `user_text`."""
    return CHINESE_STORY if _IS_CHINESE.search(user_text) else ENGLISH_STORY


def short_answer(user_text: str) -> str:
    """Like `answer`, with a story of one sentence: for an answer that is not streamed."""
    if _wants_stop(user_text):
        return answer(user_text)
    story = _SHORT_CHINESE if _IS_CHINESE.search(user_text) else _SHORT_ENGLISH
    return f"{_opening(user_text)}{story}"


def tokens(text: str) -> list[str]:
    """Split `text` as a model would stream it; the concatenation is exactly `text`.

    A word keeps its leading space and its punctuation; Chinese comes in one or two characters.
    """
    return _TOKEN.findall(text)


def _wants_stop(text: str) -> bool:
    if _NOT_STOP.search(text):
        return False
    short = len(text.split()) <= _SHORT_WORDS and len(_IS_CHINESE.findall(text)) <= _SHORT_HAN
    return bool(_OPENS_WITH_STOP.match(text) or (short and _HAS_STOP.search(text)))


def _opening(user_text: str) -> str:
    quote = " ".join(user_text.split()).strip(".?!。？！… ")
    if len(quote) > _QUOTE_CHARS:
        quote = quote[:_QUOTE_CHARS].rstrip() + "…"
    if _IS_CHINESE.search(user_text):
        return f"您说“{quote}”，这倒让我想起一个故事。"
    return f"“{quote}”: that reminds me of a story." if quote else "Let me tell you a story."


def _flow(raw: str, glue: str) -> str:
    """Join the lines of each paragraph; one empty line separates paragraphs."""
    return "\n\n".join(glue.join(part.split("\n")) for part in raw.strip().split("\n\n"))


_STOPPED_ENGLISH = "All right, I'll leave it there. Just say so when you'd like to hear more."
_STOPPED_CHINESE = "好的，我就停在这里。想接着听的时候，告诉我一声就行。"
_SHORT_ENGLISH = (
    " A keeper's lamp had a broken wheel and paused once in every turn, and it was by the pause"
    " that the fishermen knew they were home."
)
_SHORT_CHINESE = "从前有一支驼队，领头的人从不回头看，只听队尾那只破铜铃：铃声一停，全队都停。"

ENGLISH_STORY = _flow(
    """
This is the lamp room of Carrow Head, and the lamp above us was lit for the first time in 1871.
Mind the third stair on your way down; it has been tripping visitors for longer than I have been
a guide.

The keeper everyone asks about is Ines Marrable. She came here at twenty-six with one trunk, one
kettle, and a cat who had not been consulted. The Board of Lights had promised her a view, and in
that one matter the Board of Lights was honest. From the gallery you can see nine miles of water
on a clear day. On a day that is not clear you can see your own hand, if you are not too proud to
hold it close.

Her work was simple to describe and hard to do. At dusk she climbed one hundred and twelve steps,
trimmed the wick, lit it, and wound the clockwork that turned the lens. The weight that drove the
clockwork sank slowly down the middle of the tower, just like the weight in your grandmother's
clock, and every four hours it reached the bottom and had to be wound up again. So Ines slept in
pieces. She used to say that she had not had a whole night since she was a girl, but that she had
been given twice as many mornings as other people.

Now, the lens was supposed to turn smoothly. One flash every ten seconds, said the book of lights
that every captain carried. But in her second winter a tooth broke off the smallest wheel, and
from that night on, once in every turn, the beam stopped. Only for a moment, about as long as it
takes to draw a breath. It swept over the bay, it hesitated, it went on. She wrote to the Board.
The Board wrote back that a new wheel had been ordered. She filed the letter, and for eleven years
the letter was all that anybody saw of the wheel.

In those eleven years something happened that nobody had planned. There are four lights along this
coast, and in bad weather, between the rain and the fear, one light is very like another. Men had
died of that. But a fisherman who saw a beam that paused, as if it had just remembered something,
knew exactly where he was. "That's Ines," they said. "She's thinking." And they turned for the
harbour mouth, with the rocks on the left and supper straight ahead.

Then, one fine April morning, the wheel arrived. With it came a young engineer named Tobias Fenn,
who had polished boots, a leather case of tools, and a great love of things that work properly. He
was shocked by the state of the clockwork, and said so several times. By the afternoon he had the
new wheel in, and that evening he stood on the gallery with his watch in his hand and counted. Ten
seconds. Ten seconds. Ten seconds. He told Ines that it was the most beautiful sight on the whole
coast. She agreed that it was very regular.

He would have left on the next day's boat, but the weather closed in, and so he was still here on
the third night, when the fog came up the bay like milk filling a bowl. A little after two they
heard a ship's bell where no bell should be. Then shouting. Then the long, ugly sound of a keel
that has found the bottom.

It was the Halcyon, with fourteen people aboard. Her captain had been looking for the light that
paused. He saw a light that did not, took it for the one on Stennet Point, eleven miles to the
north, and steered with perfect care to where the rocks were. Ines and Tobias took the rowing boat
out four times, and four times they came back. They brought in all fourteen, and a goat that
nobody on board would admit to owning.

At dawn, when the last of them was asleep by the stove under every blanket in the house, Tobias
climbed the stairs alone. From below, Ines heard the sound of a file. It went on for a quarter of
an hour. When he came down, his hands were black, and he laid one small brass tooth on the kitchen
table, next to the teapot.

"I believe," he said, "that I mistook what it was for."

"Most people do," said Ines. "They suppose that it's the shining that helps. But anything can
shine. It's where you stop that tells them who you are."

He stayed for breakfast. As it turned out, he stayed for thirty-four years, and the second name on
the brass plate by the door is his. In his report to the Board he wrote that the new wheel had
been fitted, that it had been found to have a defect, and that the defect was on no account to be
repaired.

The lamp is electric now, and a computer in the harbour office looks after it. When the
technicians came to install it, they asked the town what the proper rhythm of the light was, and
I suppose they expected a number. They were sent to the Fisherman's Arms, where they were told, by
everyone, at once, and at some length. So if you are still here tonight, and I hope you will be,
look up from the quay and watch the beam go out over the water. It will sweep, and it will
hesitate, just long enough for a breath, and then it will go on.

The tooth is in the glass case behind you. You are welcome to put a hand on the glass. Everyone
does.
""",
    " ",
)

CHINESE_STORY = _flow(
    """
各位请往这边走，看看展柜里的这只铜铃。它只有拳头那么大，
边上还缺了一个口，可是一百多年前，一整支驼队的性命都系在它身上。

驼队的领头人姓马，沙路上的人都叫他马三爷。三爷走了四十年沙漠，有一个
怪脾气：他从不回头看。别人问他，后面四十峰骆驼，你就不怕丢了一峰？他指指
自己的耳朵，说，我听着呢。原来队尾最后一峰骆驼的脖子上挂着这只铃，一步一响。
铃声在，人就齐；铃声一停，他便举起手来，全队跟着停。

那一年秋天，队尾牵骆驼的是个十三岁的孩子，名叫阿吉。他牵的那峰骆驼叫老灰，
走得最慢，脾气最倔，见了石头要闻一闻，见了月亮也要看一看。铜铃缺了口，声音
沙哑，像一个感冒的人在说话，阿吉总觉得丢脸。三爷却对他说：“好听的铃到处都有，
认得出来的铃只有这一个。”

同行的还有一位钱掌柜，带着二十箱茶叶和绸缎，急着赶在下雪以前出关。
他嫌队伍走得慢，更嫌那只破铃难听。走到第六天，他从箱子里取出十二只银铃，
亲手挂在头驼的脖子上。银铃一响，清清亮亮，整片戈壁都像在过节，人人都说好。
只有三爷皱了皱眉头，可是掌柜出的是大价钱，他到底没有开口。

第九天夜里起了风。先是细沙贴着地面跑，后来天和地就分不清了。队伍低着头往前赶，
头驼的银铃在风里响成一片，热闹极了。三爷侧着耳朵，听来听去，只听见银子的声音。
他心里忽然一沉，大喊一声：“停！把银铃摘下来！”

钱掌柜不肯，说风这么大，停下来就是等死。三爷没有同他争，自己走过去，一只一只地摘，
摘一只，往怀里揣一只。十二只都摘完了，四十个人站在风里，谁也不说话。
他们等着那个沙哑的声音，可是什么也没有等到。队尾空了，阿吉和老灰不见了。

这时候有人想起来，老灰虽然慢，却最稳当，所以全队的水，一大半都驮在它的背上。
钱掌柜一屁股坐在沙地里，半天没有站起来。

三爷让大家把骆驼围成一圈，人躲在里面，不许点火，不许说话，连咳嗽都要捂在袖子里。
他说：“我们丢的不是路，是声音。要找声音，先得自己安静。”就这样等了大半夜。
快天亮的时候，风小了一点，远远地，从西北边的沙梁后面，传来了一声响，
哑哑的，好像一个感冒的人在说话。过了一会儿，又是一声。

他们找到阿吉的时候，那孩子正靠在老灰的肚子旁边，身上盖着半尺厚的沙。原来缰绳
断了，等他接好，前面的人已经走远。他喊了几声，声音全让风吞掉了。他本来想追，
可是想起三爷教过他：走丢了，就停下来，乱走的人谁也找不着。于是他让老灰卧下，
自己缩在背风的一面。老灰不慌不忙，一整夜都在嚼它的草料，嚼一口，脖子动一动，
铃就响一声。

三爷蹲下来，拍掉孩子头上的沙子，只问了一句：“水呢？”阿吉说：“一滴都没有洒。”
听到这句话，四十条汉子里头，有一大半都转过脸去擦眼睛，说是沙子迷了眼。

后来驼队平平安安地出了关。钱掌柜把十二只银铃留给了阿吉，算是一份谢礼。
阿吉没有把它们挂起来，他换了钱，给老灰买了一整个冬天的好草料，剩下的
打了一条新缰绳。

又过了许多年，阿吉也成了领头人，人们改口叫他吉爷。他的驼队有一条规矩：每天太阳
落山的时候，不管走到哪里，全队都要停下来，安安静静地站一碗茶的工夫，
听一听队尾的铃。有年轻人着急，说这不是耽误路吗？吉爷就笑，说：
“会走的驼队不稀罕，会停的驼队，才走得远。”

这只铜铃，就是他的孙女送到我们馆里来的。每到闭馆的时候，我都要在这里多站一会儿。
各位要是不赶时间，也请陪我安静片刻。如果您听见了什么，那多半是窗外的风；
不过三爷要是还在，他一定会说：别急，再听听。
""",
    "",
)
