"Pascal VOC files as people's tools write them: what is plainly meant is read, what is not is one line."
import random
import warnings

import pytest
from PIL import Image

from helpers import right_or_refused
from synthdet import core
from synthdet.data.annotations import read_detection

W, H = 80, 60
CORNERS = [20, 15, 60, 45]
BOX = '<bndbox><xmin>21</xmin><ymin>16</ymin><xmax>60</xmax><ymax>45</ymax></bndbox>'
SIZE = f'<size><width>{W}</width><height>{H}</height><depth>3</depth></size>'


def save(path, size=(W, H)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new('RGB', size, (90, 120, 60)).save(path)


def xml(box=BOX, name='bird', more='', size=SIZE, head='<filename>a.png</filename>'):
    return f'<annotation>{head}{size}<object><name>{name}</name>{more}{box}</object></annotation>'


def written(folder, text, name='a.xml', image='a.png'):
    if image: save(folder / image)
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    (folder / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    return folder


def refused(*args, **options):
    line = core.refused(*args, **options)
    assert '.xml' in line and ('; ' in line or ', so ' in line), line
    return line


POINTS = '<pt><x>20</x><y>15</y></pt><pt><x>60</x><y>15</y></pt><pt><x>40</x><y>45</y></pt>'
GB = '<?xml version="1.0" encoding="gb2312"?>' + xml(name='蝴蝶')
PLAIN = dict(
    usual=xml(), floats=xml(BOX.replace('21', '21.0').replace('45', ' 45.00 ')),
    size_of_0=xml(size=SIZE.replace('80', '0').replace('60', '0')),
    no_size=xml(size=''), empty_size=xml(size='<size/>'), size_in_floats=xml(size=SIZE.replace('80', '80.0')),
    other_order=xml('<bndbox><ymax>45</ymax><xmax>60</xmax><ymin>16</ymin><xmin>21</xmin></bndbox>'),
    swapped_corners=xml('<bndbox><xmin>60</xmin><ymin>45</ymin><xmax>21</xmax><ymax>16</ymax></bndbox>'),
    outline=xml(f'<polygon>{POINTS}</polygon>'),
    short_outline=xml('<polygon><x1>20</x1><y1>15</y1><x2>60</x2><y2>45</y2></polygon>'),
    parts=xml(more='<part><name>head</name>'
                   '<bndbox><xmin>1</xmin><ymin>1</ymin><xmax>9</xmax><ymax>9</ymax></bndbox></part>'),
    blanks=xml(name=' bird\n'), namespace=xml().replace('<annotation>', '<annotation xmlns="http://example.org/voc">'),
    mark_of_order=b'\xef\xbb\xbf' + xml().encode(),
    utf16=('<?xml version="1.0" encoding="utf-16"?>' + xml()).encode('utf-16'),
    wrongly_declared='<?xml version="1.0" encoding="utf-16"?>' + xml(), comment='<!-- made by hand -->\n' + xml(),
    blank_lines='\n\n<?xml version="1.0"?>\n' + xml(),
    latin=('<?xml version="1.0" encoding="ISO-8859-1"?>' + xml(more='<pose>ä</pose>')).encode('latin-1'),
    deleted=xml().replace('</annotation>', '<object><name>x</name><deleted>1</deleted></object></annotation>'),
    no_mark=xml(more='<difficult></difficult><truncated>1</truncated><occluded>yes</occluded>'))


@pytest.mark.parametrize('how', PLAIN)
def test_what_is_plainly_meant_is_read(tmp_path, how):
    ds = read_detection(written(tmp_path, PLAIN[how]))
    assert ds.classes == ('bird',) and ds.targets[0]['boxes'].tolist() == [CORNERS]
    assert ds.targets[0].keys() == {'boxes', 'labels', 'image_id'} and len(ds) == 1


def test_names_in_a_declared_encoding(tmp_path):
    assert read_detection(written(tmp_path, GB.encode('gb18030'))).classes == ('蝴蝶',)
    assert 'not a text in gb2312' in refused(read_detection, written(tmp_path, GB.encode('utf-8')[:-1] + b'\xff'))


@pytest.mark.parametrize('value, hard', [('1', True), (' true ', True), ('0', False), ('False', False)])
def test_difficult_is_read(tmp_path, value, hard):
    text = xml(more=f'<difficult>{value}</difficult>')
    two = text.replace('</object>', '</object><object><name>bird</name><difficult>1</difficult>' + BOX + '</object>', 1)
    assert read_detection(written(tmp_path, two)).targets[0]['difficult'].tolist() == [hard, True]
    assert ('difficult' in read_detection(written(tmp_path, text)).targets[0]) == hard


ODD = [(xml(BOX.replace('21', 'left')), "xmin is 'left'"), (xml(BOX.replace('<xmin>21</xmin>', '')), "xmin is ''"),
       (xml(''), 'has neither bndbox nor polygon'), (xml('<polygon/>'), 'has neither'), (xml(name=''), 'cannot be one'),
       (xml(name='a/b'), 'cannot be one'), (xml(more='<difficult>perhaps</difficult>'), "difficult is 'perhaps'"),
       (xml(size=SIZE.replace('80', '60').replace('60</h', '80</h')), 'is 60 x 80 there'),
       (xml(size=SIZE.replace('80', 'wide')), "width is 'wide'"),
       (xml()[:-30], 'not XML'), ('<!DOCTYPE annotation [<!ENTITY a "b"><!ENTITY c "&a;&a;">]>' + xml(name='&c;'),
                                  'not XML'),
       (xml(BOX.replace('60', '21').replace('21', '90')), 'no box can be used')]


@pytest.mark.parametrize('text, told', ODD)
def test_what_is_not_plain_is_one_line(tmp_path, text, told):
    assert told in refused(read_detection, written(tmp_path, text))


def test_sub_folders_are_mirrored(tmp_path):
    for n in ('x/a', 'y/a', 'b'): written(tmp_path, xml(head=''), f'Annotations/{n}.xml', f'JPEGImages/{n}.png')
    ds = read_detection(tmp_path)
    assert [str(f.relative_to(tmp_path / 'JPEGImages')) for f in ds.files] == ['b.png', 'x/a.png', 'y/a.png']


def test_filename_decides_where_the_name_does_not(tmp_path):
    written(tmp_path, xml(head='<filename>a.png</filename>'), 'b.xml')
    assert read_detection(tmp_path).files == [tmp_path / 'a.png'], 'renamed'
    written(tmp_path, xml(head='<filename>gone</filename>'), 'b.xml')
    assert 'gone is missing' in refused(read_detection, tmp_path)
    (tmp_path / 'b.xml').unlink()
    written(tmp_path, xml(head='<filename>a.jpg</filename>'), image='a.jpg')
    assert read_detection(tmp_path).files == [tmp_path / 'a.jpg'], 'of two with one stem'
    written(tmp_path, xml(head=''))
    assert 'may be about' in refused(read_detection, tmp_path)
    (tmp_path / 'a.jpg').unlink()
    written(tmp_path, xml(), 'c.xml')
    assert 'expected one annotation per picture' in refused(read_detection, tmp_path)


def test_pictures_without_annotation_are_left_out_aloud(tmp_path):
    for n in 'abc': written(tmp_path, xml() if n == 'a' else '<annotation/>', f'{n}.xml', f'{n}.png')
    assert repr(read_detection(tmp_path)) == '3 images (2 without a box) with 1 bird'
    save(tmp_path / 'd.png')
    with pytest.warns(UserWarning, match='1 images without an XML file .d.png. left out'): ds = read_detection(tmp_path)
    assert len(ds) == 3 and '1 images without an XML file left out' in repr(ds)
    assert 'd.png: has no d.xml' in refused(read_detection, tmp_path, strict=True)


def test_corners_at_0_are_counted(tmp_path):
    ds = read_detection(written(tmp_path, xml(BOX.replace('21', '0'))))
    assert ds.targets[0]['boxes'].tolist() == [[0, 15, 60, 45]]
    assert '1 boxes from 0, where Pascal VOC counts from 1' in repr(ds)


def test_three_hundred_objects(tmp_path):
    text = xml().replace('</annotation>', f'<object><name>bee</name>{BOX}</object>'*299 + '</annotation>')
    assert len(read_detection(written(tmp_path, text)).targets[0]['boxes']) == 300


# ---- fuzz ------------------------------------------------------------------------------------------------------------

WHOLE = (f'<annotation><folder>f</folder><filename>a.png</filename>{SIZE}'
         f'<object><name>bird</name><difficult>0</difficult>{BOX}</object>'
         f'<object><name>bee</name><truncated>1</truncated><polygon>{POINTS}</polygon></object></annotation>')
JUNK = ['', '0', '-1', '1e309', 'nan', '21.5', '999999999', 'x'*300, '<a/>', '</object>', '<object>', '&lt;', '&b;',
        '<bndbox>', '<name>../x</name>', '<difficult>2</difficult>', '<!--', '<![CDATA[1]]>', '\x00', '\ufeff',
        '<?xml version="1.0"?>', 'é']


def test_any_text_is_read_or_refused(tmp_path):
    g, read = random.Random(0), 0
    parts = WHOLE.replace('<', '\n<').replace('>', '>\n').split('\n') # elements and what is between them
    assert right_or_refused(written(tmp_path, WHOLE), W, H)
    for _ in range(2000):
        some = list(parts)
        for _ in range(g.choice([1, 1, 2, 5])):
            at, how = g.randrange(len(some)), g.random()
            if how < .5: some[at] = g.choice(JUNK)
            elif how < .7: some[at] = ''
            elif how < .85: some[at:at] = some[at:at + g.choice([1, 4, 12])]
            else: some[at] = g.choice(parts)
        (tmp_path / 'a.xml').write_text(''.join(some), encoding='utf-8')
        read += right_or_refused(tmp_path, W, H)
    assert 100 < read < 1900, read


def test_any_bytes_are_read_or_refused(tmp_path):
    g, read, text = random.Random(1), 0, WHOLE.encode()
    written(tmp_path, WHOLE)
    for _ in range(2000):
        bad = bytearray(text)
        for _ in range(g.choice([1, 1, 2, 8])):
            at = g.randrange(len(bad))
            how = g.random()
            if how < .6: bad[at] = g.randrange(256)
            elif how < .8: del bad[at:at + g.choice([1, 3, 40])]
            else: bad[at:at] = bad[at:at + g.choice([1, 5, 60])]
        (tmp_path / 'a.xml').write_bytes(bytes(bad))
        read += right_or_refused(tmp_path, W, H)
    assert 50 < read < 1900, read


LINES = ['my bird', '"my bird"', 'my bird.png', 'my bird  1', 'my bird -1', 'JPEGImages/my bird.png', 'd/my bird',
         './JPEGImages/my bird.png', 'C:\\\\data\\\\JPEGImages\\\\my bird.png', '/content/VOC2007/JPEGImages/my bird']


def parts(d, train, val='x/1\n'):
    for n in ('my bird', 'x/1', 'y/1', 'v.2'): written(d, xml(head=''), f'Annotations/{n}.xml', f'JPEGImages/{n}.png')
    written(d, train, 'ImageSets/Main/train.txt', None)
    written(d, val, 'ImageSets/Main/val.txt', None)
    return d


@pytest.mark.parametrize('line', LINES)
def test_a_list_names_pictures_as_tools_do(tmp_path, line):
    d = parts(tmp_path, f'{line}\n\nv.2\r\n')
    assert [f.name for f in read_detection(d, split='train').files] == ['my bird.png', 'v.2.png']
    assert read_detection(d, split='val').files == [d / 'JPEGImages' / 'x' / '1.png']
    assert len(read_detection(d)) == 4


@pytest.mark.parametrize('line', ['gone', '1', 'my', 'z/'])
def test_a_line_that_names_no_picture_or_two_is_told(tmp_path, line):
    told = core.refused(read_detection, parts(tmp_path, f'v.2\n{line}'), split='train')
    assert 'train.txt' in told and f'({line})' in told and 'correct the list' in told


def test_an_empty_list_is_no_split_and_all_classes_count(tmp_path):
    d = parts(tmp_path, 'v.2', '')
    assert 'has no val set' in core.refused(read_detection, d, split='val')
    written(d, xml(name='cat'), 'Annotations/x/1.xml', None)
    assert read_detection(d, split='train').classes == ('bird', 'cat')
    save(d / 'JPEGImages' / 'bare.png')                             # of a list: told when it is asked for
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        assert len(read_detection(d, split='train')) == 1
    written(d, 'v.2\nbare', 'ImageSets/Main/train.txt', None)
    with pytest.warns(UserWarning, match='without an XML file .bare.png.'): read_detection(d, split='train')
