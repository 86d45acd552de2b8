"What tools export and people do by accident: sets built as they come, each read as it is meant or refused in a line."
import codecs
import json
import os
import unicodedata

import pytest
from PIL import Image

from synthdet.core import refused
from synthdet.data.annotations import read_detection

Y = '0 .5125 .5 .5 .6\n'
BOX = [10.5, 6, 30.5, 24]


def shown(path, size=(40, 30), exif=None):
    path.parent.mkdir(parents=True, exist_ok=True)
    tags = Image.Exif()
    if exif: tags[0x0112] = exif
    Image.new('RGB', size, (90, 120, 60)).save(path, format='JPEG' if exif else 'PNG', exif=tags)


def text(path, content, encoding='utf-8', bom=b''):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(bom + (content if isinstance(content, str) else json.dumps(content)).encode(encoding))


def voc(name='a.png'):
    corners = '<xmin>11</xmin><ymin>7</ymin><xmax>30</xmax><ymax>24</ymax>'
    return (f'<annotation>\n<filename>{name}</filename>\n'
            '<size><width>40</width><height>30</height><depth>3</depth></size>\n'
            f'<object><name>bird</name><bndbox>{corners}</bndbox></object>\n</annotation>')


def coco(names, ids=(1, 2, 3), cats=((1, 'bird'),), cat=1):
    return dict(images=[dict(id=i, file_name=n, width=40, height=30) for i, n in zip(ids, names)],
                annotations=[dict(id=k, image_id=i, category_id=cat, bbox=[10.5, 6, 20, 18])
                             for k, (i, _) in enumerate(zip(ids, names))],
                categories=[dict(id=i, name=n) for i, n in cats])


RIGHT, REFUSED = [], []


def right(*stems):
    "A set of one picture with a bird at BOX (Pascal VOC: whole pixels), or of `stems`, the last of which may be bare."
    return lambda make: RIGHT.append((make, stems)) or make


def refusal(words): return lambda make: REFUSED.append((make, words)) or make


@right()
def cvat_images_11_xml_beside_coco(d):
    shown(d/'images/a.png')
    text(d/'annotations.xml',
         '<?xml version="1.0"?><annotations><version>1.1</version><image id="0" name="a.png" width="40" height="30">'
         '<box label="bird" xtl="1" ytl="2" xbr="3" ybr="4"/></image></annotations>')
    text(d/'annotations/instances_default.json',coco(['a.png']))


@refusal("root element is 'annotations'")
def cvat_images_11_alone(d):
    shown(d/'images/a.png')
    text(d/'annotations.xml',
         '<?xml version="1.0"?><annotations><version>1.1</version><image id="0" name="a.png" width="40" height="30"/>'
         '</annotations>')


@right()
def via_csv_beside_coco(d):
    shown(d/'a.png')
    text(d/'via_export_csv.csv',
         'filename,file_size,file_attributes,region_count,region_id,region_shape_attributes\n'
         'a.png,1,"{}",1,0,"{}"')
    text(d/'via_project.json',{'_via_settings':{},'_via_img_metadata':{}})
    text(d/'via_export_coco.json',coco(['a.png']))


@refusal('expected an object with images, annotations, categories')
def supervisely(d):
    shown(d/'ds/img/a.png')
    points = {'exterior':[[1,2],[30,20]],'interior':[]}
    objects = [{'classTitle':'bird','points':points,'geometryType':'rectangle'}]
    text(d/'ds/ann/a.png.json',{'size':{'height':30,'width':40},'objects':objects})
    text(d/'meta.json',{'classes':[{'title':'bird'}]})


@right()
def labelimg_classes_beside_voc(d):
    shown(d/'a.png')
    text(d/'a.xml',voc())
    text(d/'classes.txt','bird\ncat\n')
    text(d/'predefined_classes.txt','dog\nperson\n')


@right('a', 'b')
def roboflow_valid(d):
    for s,n in (('train','a'),('valid','b')):
        shown(d/s/f'images/{n}.png')
        text(d/s/f'labels/{n}.txt',Y)
    text(d/'data.yaml',
         'train: ../train/images\nval: ../valid/images\nnc: 1\nnames: [bird]\nroboflow:\n  workspace: x\n')


@right()
def upper_folders_yolo(d):
    shown(d/'Images/a.png')
    text(d/'Labels/a.txt',Y)
    text(d/'Classes.txt','bird\n')


@right()
def upper_folders_voc(d):
    shown(d/'IMAGES/a.png')
    text(d/'ANNOTATIONS/a.xml',voc())


@right()
def bom_yolo(d):
    shown(d/'images/a.png')
    text(d/'labels/a.txt',Y,bom=codecs.BOM_UTF8)
    text(d/'classes.txt','bird\n',bom=codecs.BOM_UTF8)


@right()
def utf16_yolo(d):
    shown(d/'images/a.png')
    text(d/'labels/a.txt',Y,'utf-16')
    text(d/'classes.txt','bird\n','utf-16')


@right()
def utf16_coco(d):
    shown(d/'a.png')
    text(d/'x.json',coco(['a.png']),'utf-16')


@right()
def utf16_voc(d):
    shown(d/'a.png')
    text(d/'a.xml','<?xml version="1.0" encoding="utf-16"?>'+voc(),'utf-16')


@right()
def crlf_all_yolo(d):
    shown(d/'images/a.png')
    text(d/'labels/a.txt',Y.replace('\n','\r\n')+'\r\n')
    text(d/'data.yaml','names:\r\n- bird\r\n')


@right()
def cr_only_yolo(d):
    shown(d/'images/a.png')
    text(d/'labels/a.txt',Y.replace('\n','\r'))
    text(d/'classes.txt','bird\rcat\r')


@right()
def hash_and_percent_names_yolo(d):
    shown(d/'images/a#1 100%.png')
    text(d/'labels/a#1 100%.txt',Y)
    text(d/'classes.txt','bird')


@right()
def hash_and_percent_names_coco(d):
    shown(d/'images/a#1%20x.png')
    text(d/'x.json',coco(['a#1%20x.png']))


@right()
def trailing_blank_coco(d):
    shown(d/'images/a.png')
    text(d/'x.json',coco(['a.png ']))


@right()
def trailing_blank_in_list(d):
    shown(d/'images/a.png')
    text(d/'labels/a.txt',Y)
    text(d/'train.txt','./images/a.png  \n\n')
    text(d/'data.yaml','train: train.txt\nval: train.txt\nnames: [bird]')


@right()
def nfd_file_nfc_yolo(d):
    shown(d/'images'/unicodedata.normalize('NFD','é.png'))
    text(d/'labels'/unicodedata.normalize('NFC','é.txt'),Y)
    text(d/'classes.txt','bird')


@right()
def nfd_file_nfc_voc(d):
    shown(d/'JPEGImages'/unicodedata.normalize('NFD','é.png'))
    text(d/'Annotations'/unicodedata.normalize('NFC','é.xml'),voc('é.png'))


@right()
def nfd_file_nfc_list(d):
    shown(d/'images'/unicodedata.normalize('NFD','é.png'))
    text(d/'labels'/unicodedata.normalize('NFD','é.txt'),Y)
    text(d/'train.txt',unicodedata.normalize('NFC','images/é.png\n'))
    text(d/'data.yaml','train: train.txt\nnames: [bird]')


@right()
def same_name_in_splits_coco(d):
    for s in ('train','val'):
        shown(d/s/'1.png')
        text(d/f'annotations/instances_{s}.json',coco(['1.png']))


@right('1', '1')
def same_name_in_splits_yolo(d):
    for s in ('train','val'):
        shown(d/f'images/{s}/1.png')
        text(d/f'labels/{s}/1.txt',Y)
    text(d/'data.yaml','path: .\ntrain: images/train\nval: images/val\nnames: {0: bird}')


@right()
def exif_shown_coco(d):
    shown(d/'a.jpg',(30,40),exif=6)
    text(d/'x.json',coco(['a.jpg']))


@refusal('annotate the picture as it is shown')
def exif_stored_coco(d):
    shown(d/'a.jpg',(40,30),exif=6)
    text(d/'x.json',coco(['a.jpg']))


@right()
def ids_not_contiguous(d):
    shown(d/'a.png')
    text(d/'x.json',coco(['a.png'],ids=[900001],cats=((90,'bird'),(3,'cat'),(17,'dog')),cat=90))


@right('a', 'b')
def zero_byte_label(d):
    shown(d/'images/a.png')
    shown(d/'images/b.png')
    text(d/'labels/a.txt',Y)
    text(d/'labels/b.txt','')
    text(d/'classes.txt','bird')


@refusal('not XML')
def zero_byte_xml(d):
    shown(d/'a.png')
    shown(d/'b.png')
    text(d/'a.xml',voc())
    text(d/'b.xml','')


@refusal('its image is missing')
def label_without_picture(d):
    shown(d/'images/a.png')
    text(d/'labels/a.txt',Y)
    text(d/'labels/gone.txt',Y)
    text(d/'classes.txt','bird')


@refusal('expected the same names')
def nested_sets(d):
    shown(d/'images/a.png')
    text(d/'labels/a.txt',Y)
    text(d/'classes.txt','bird')
    shown(d/'old/images/b.png')
    text(d/'old/labels/b.txt','0 .5 .5 .1 .1')
    text(d/'old/classes.txt','cat')


@right()
def linked_images(d):
    shown(d/'.disk/a.png')
    os.symlink('.disk',d/'images')
    text(d/'labels/a.txt',Y)
    text(d/'classes.txt','bird')


@right()
def label_studio_json_min_beside(d):
    shown(d/'images/a.png')
    text(d/'result.json',coco(['images/a.png']))
    text(d/'project-1.json',[{'image':'x','label':[]}])


@right()
def double_suffix_yolo(d):
    shown(d/'images/a.jpg.png')
    text(d/'labels/a.jpg.txt',Y)
    text(d/'classes.txt','bird')


@right()
def dots_in_names(d):
    shown(d/'images/2020.01.02.frame.7.png')
    text(d/'labels/2020.01.02.frame.7.txt',Y)
    text(d/'classes.txt','bird')


@refusal('no finite number')
def german_decimal_yolo(d):
    shown(d/'images/a.png')
    text(d/'labels/a.txt','0 0,5125 0,5 0,5 0,6\n')
    text(d/'classes.txt','bird')


@right()
def float_class_yolo(d):
    shown(d/'images/a.png')
    text(d/'labels/a.txt','0.0 .5125 .5 .5 .6\n')
    text(d/'classes.txt','bird')


@right()
def tabs_yolo(d):
    shown(d/'images/a.png')
    text(d/'labels/a.txt','0\t.5125\t.5\t.5\t.6\n')
    text(d/'classes.txt','bird')


@right()
def upper_suffix_picture(d):
    shown(d/'images/A.PNG')
    text(d/'labels/A.txt',Y)
    text(d/'classes.txt','bird')


@right()
def case_differs_label(d):
    shown(d/'images/Photo.png')
    text(d/'labels/photo.txt',Y)
    text(d/'classes.txt','bird')


@right()
def case_differs_voc(d):
    shown(d/'Photo.png')
    text(d/'photo.xml',voc('Photo.png'))


@right()
def zip_extracted_twice(d):
    shown(d/'set/set/images/a.png')
    text(d/'set/set/labels/a.txt',Y)
    text(d/'set/set/data.yaml','names: [bird]')
    shown(d/'__MACOSX/set/._a.png')


@right()
def coco_gz_json_lines_beside(d):
    shown(d/'a.png')
    text(d/'_annotations.coco.json',coco(['a.png']))
    text(d/'log.jsonl','{"a":1}\n{"a":2}\n')
    text(d/'README.roboflow.txt','Roboflow 2020\n')


@right()
def mirrored_json_copy(d):
    shown(d/'a.png')
    text(d/'instances.json',coco(['a.png']))
    text(d/'instances (1).json.bak',coco(['a.png']))


@right()
def voc_filename_without_suffix(d):
    shown(d/'JPEGImages/a.png')
    text(d/'Annotations/a.xml',voc('a'))


@right()
def voc_float_corners(d):
    shown(d/'a.png')
    text(d/'a.xml',voc().replace('>11<','>11.0<').replace('>24<','> 24.0 <'))


def birds(data): return [[data.classes[l-1] for l in t['labels']] for t in data.targets]


@pytest.mark.parametrize('make, stems', RIGHT, ids=lambda m: getattr(m, '__name__', ''))
@pytest.mark.filterwarnings('ignore')
def test_a_set_is_read_as_it_is_meant(make, stems, tmp_path):
    make(tmp_path)
    data = read_detection(tmp_path, split='train' if (tmp_path/'annotations'/'instances_train.json').exists() else None)
    assert len(data) == max(1, len(stems)) and [f.stem for f in data.files] == list(stems or [data.files[0].stem])
    assert birds(data) == [['bird']]*(len(data) - (make is zero_byte_label)) + [[]]*(make is zero_byte_label)
    for i, t in enumerate(data.targets):
        assert data[i][0].shape == (3, 30, 40)
        assert all((b - b.new(BOX)).abs().max() <= .5 for b in t['boxes'])


@pytest.mark.parametrize('make, words', REFUSED, ids=lambda m: getattr(m, '__name__', ''))
@pytest.mark.filterwarnings('ignore')
def test_what_cannot_be_read_as_it_is_meant_is_a_line(make, words, tmp_path):
    make(tmp_path)
    assert words in refused(read_detection, tmp_path)


def test_names_that_differ_by_case_alone_are_not_guessed_where_two_fit(tmp_path):
    for n in ('A', 'a'): shown(tmp_path/'images'/f'{n}.png')
    text(tmp_path/'classes.txt', 'bird')
    text(tmp_path/'labels'/'a.txt', Y)
    assert birds(read_detection(tmp_path)) == [[], ['bird']]
    (tmp_path/'labels'/'a.txt').rename(tmp_path/'labels'/'a.TXT')
    shown(tmp_path/'images'/'É.png')
    text(tmp_path/'labels'/'é.txt', Y)
    text(tmp_path/'labels'/unicodedata.normalize('NFD', 'é.txt'), Y)
    assert 'its image is missing' in refused(read_detection, tmp_path)
